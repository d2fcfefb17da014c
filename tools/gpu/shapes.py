"""The shape that the GPU checks measure, 7B's layers with random weights, and what they share.

A layer's cost depends on its shape alone, so a few of a large model's layers show its rate; the output layer, which a
whole model has once, is measured by itself and added.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import torch

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.build import build_model
from megatron_rlt.models.fp8 import weight_writer
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device
from megatron_rlt.types import Span, SpannedSequence

QWEN_7B = Architecture(
    family="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_size=18944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=152064,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    norm_epsilon=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    max_positions=32768,
)
TINY = replace(
    QWEN_7B, num_layers=2, hidden_size=256, ffn_size=512, num_heads=2, num_kv_heads=1, vocab_size=1000
)  # of a dry run
_STD = 0.02


def with_layers(num_layers: int, *, dry: bool) -> Architecture:
    """7B's shape with so many layers; in a dry run the tiny one."""
    return TINY if dry else replace(QWEN_7B, num_layers=num_layers)


def random_model(architecture: Architecture, layout: Layout, fp8: Fp8Config | None = None) -> LanguageModel:
    """A bfloat16 model with seeded random weights, the same for every `fp8` before rounding."""
    model = build_model(architecture, layout, dtype=torch.bfloat16, recompute="none", fp8=fp8)
    if fp8 is None:
        model.to(device())
    generator, write = torch.Generator(device=device()).manual_seed(0), weight_writer(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device())
            if "norm" in name:
                values.fill_(1.0)
            elif name.endswith("bias"):
                values.zero_()
            else:
                values.normal_(std=_STD, generator=generator)
            write(parameter, values)
    return model


def random_sequences(count: int, length: int, vocab_size: int, *, seed: int = 0) -> list[SpannedSequence]:
    """Sequences of random ids; all but the first tenth of each is scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (count, length), generator=generator)
    return [SpannedSequence(row, (Span(max(length // 10, 1), length),)) for row in ids]


def median_seconds(work: Callable[[], object], *, rounds: int) -> float:
    """Median over `rounds` calls after one that warms up, each up to the end of its kernels."""
    work()
    seconds = []
    for _ in range(rounds):
        synchronise()
        start = perf_counter()
        work()
        synchronise()
        seconds.append(perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> int:
    """Bytes of the GPU that are allocated now; peaks count from here."""
    gc.collect()  # models are circles of references
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes() -> int:
    """Most bytes allocated at one time since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
