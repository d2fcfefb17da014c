"""Activations by hand, and the tensors that autograd really saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rlt.planning.activations import (
    LayerForm,
    Split,
    Stage,
    passing_per_token,
    saved_per_token,
    training_bytes,
)
from megatron_rlt.planning.output_layer import OutputLayer, shard_entries

GPT = LayerForm(hidden=64, query=64, key=64, ffn=256, head_dim=16, is_gated=False, is_rotary=False, has_dropout=True)
LLAMA = LayerForm(hidden=64, query=64, key=32, ffn=96, head_dim=16)


@pytest.mark.parametrize(
    ("split", "factor"),
    [
        (Split(1, 1), 34),  # arXiv 2205.05198, table 2, without the scores: 10 + 24
        (Split(4, 1), 10 + 24 / 4),
        (Split(4, 4), 34 / 4),
    ],
)
def test_a_gpt_layer_saves_what_the_paper_on_selective_recomputation_says(split: Split, factor: float) -> None:
    assert saved_per_token(GPT, split, dtype_bytes=2, is_fused=True) == factor * 64


def test_a_llama_layer_by_hand() -> None:
    # Two norms' inputs and results; product of query, key, value 128, rotated 96, output 64; feed-forward 2 x 96 + 96.
    assert saved_per_token(LLAMA, Split(1, 1), dtype_bytes=2, is_fused=True) == 2 * (4 * 64 + 128 + 96 + 64 + 288)
    # In float32 without Transformer Engine: three tensors a norm, 4 x 16 of cosine and sine, the output twice, and five
    # of the feed-forward size: both halves, silu, the linear half, the product.
    assert saved_per_token(LLAMA, Split(1, 1), dtype_bytes=4, is_fused=False) == 4 * (
        6 * 64 + 64 + 128 + 96 + 2 * 64 + 5 * 96
    )
    normed = replace(LLAMA, has_head_norms=True)
    assert saved_per_token(normed, Split(2, 1), dtype_bytes=2, is_fused=True) == 2 * (4 * 64 + (288 + 96 + 288) / 2)


def test_what_passes_and_is_not_kept() -> None:
    # Residual and normed hidden states, 3 x 96 of the feed-forward part.
    assert passing_per_token(LLAMA, Split(1, 1), dtype_bytes=2, is_fused=True) == 2 * (2 * 64 + 288)
    # Sequence parallelism halves both and gathers one again.
    assert passing_per_token(LLAMA, Split(2, 2), dtype_bytes=2, is_fused=True) == 2 * (64 + 64 + 144)


@pytest.mark.parametrize(("stage", "in_flight"), [(0, 4), (1, 3), (3, 1)])
def test_the_first_stage_holds_most_packs(stage: int, in_flight: int) -> None:
    saved = saved_per_token(LLAMA, Split(1, 1), dtype_bytes=2, is_fused=True)
    place = Stage(2, is_first=stage == 0, is_last=stage == 3, in_flight=in_flight)
    settings = {"tokens": 100.0, "output_bytes": 1e9, "dtype_bytes": 2, "is_fused": True}
    kept = training_bytes(LLAMA, Split(1, 1), place, recompute="none", **settings)  # type: ignore[arg-type]
    assert kept == in_flight * 2 * saved * 100 + 1e9
    recomputed = training_bytes(LLAMA, Split(1, 1), place, recompute="full", **settings)  # type: ignore[arg-type]
    assert recomputed == in_flight * 2 * 2 * 64 * 100 + 1e9


def test_the_output_layer_by_hand() -> None:
    layer = OutputLayer(hidden=64, shard=1000, row_block=10, vocab_block=300, dtype_bytes=2, gathers=False, tp=1)
    hidden = 3 * 50 * 64 * 2
    assert layer.forward_bytes(50) == 2 * 4 * 10 * 300 + hidden
    # A block's gradient and its bfloat16 copy; the block's weight gradient twice in float32; the shard's in bfloat16;
    # the hidden states' in float32.
    assert layer.backward_bytes(50) == 6 * 10 * 300 + 2 * 4 * 300 * 64 + 1000 * 64 * 2 + 50 * 64 * 4 + hidden
    assert shard_entries(101, 2) == 51
