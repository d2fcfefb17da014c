"""The machine's own matrix-product rate, and memory of this process."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

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


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most memory this process ever held (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
