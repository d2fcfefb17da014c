"""The machine's own matrix-product rate, and memory of this process."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def matmul_flops_per_second(dtype: torch.dtype, *, size: int = 2048, runs: int = 7) -> float:
    """Median rate of a square matrix product, the ceiling that shares are quoted against."""
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: left @ right, runs=runs)


def median_seconds(work: Callable[[], object], *, runs: int) -> float:
    """Median wall time after one warm-up run."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def held_bytes() -> int:
    """Memory this process holds now, after the C library gave back what it only kept for later."""
    with suppress(OSError, AttributeError):  # a C library other than glibc: then the figure includes what it keeps
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def reset_peak_resident_bytes() -> None:
    """Begin a new peak: loading a model must not count for the pass that follows (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Most memory this process held since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def describe_machine() -> dict[str, str | int | float]:
    """What a table of results must say about where it was measured; rates in GFLOP/s on all cores of this process."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "matmul_float32_gflops": round(matmul_flops_per_second(torch.float32) / 1e9, 1),
        "matmul_bfloat16_gflops": round(matmul_flops_per_second(torch.bfloat16, size=1024, runs=3) / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
