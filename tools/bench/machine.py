"""The machine's own matrix-product rate, memory of this process, and the work a model call costs."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from megatron_rlt.models.architecture import Architecture


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


def forward_flops(architecture: Architecture, lengths: Sequence[int], num_rows: int) -> float:
    """Multiply-adds x 2 of one forward pass: layers, causal attention, and the output layer for `num_rows` rows."""
    heads = architecture.num_heads + 2 * architecture.num_kv_heads
    attention_out = architecture.num_heads * architecture.head_dim
    layer = architecture.hidden_size * (heads * architecture.head_dim + attention_out + 3 * architecture.ffn_size)
    tokens = sum(lengths)
    causal_scores = sum(length * (length + 1) / 2 for length in lengths)
    return (
        2.0 * architecture.num_layers * layer * tokens
        + 4.0 * architecture.num_layers * attention_out * causal_scores
        + 2.0 * num_rows * architecture.hidden_size * architecture.vocab_size
    )
