"""Packing loses nothing, mixes nothing, and shares work evenly."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.flops import scoring_flops
from megatron_rlt.models.packing import (
    Alignment,
    alignment_of,
    empty_batch,
    pack,
    partition,
    partition_by_flops,
)
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.types import Span, SpannedSequence
from tests.models.dense import random_sequences
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_QWEN_7B = Architecture(  # Qwen2.5-7B's shape
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
_LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def _whole(multiple: int) -> Alignment:
    return Alignment(multiple, sequence=1, cp=1, cp_rank=0)


def test_a_pack_by_hand() -> None:
    # Longest first: sequence 1 (4 tokens), then sequence 0 (3 tokens); 7 tokens padded to 8.
    sequences = [
        SpannedSequence(torch.tensor([10, 11, 12]), (Span(2, 3),)),
        SpannedSequence(torch.tensor([20, 21, 22, 23]), (Span(1, 2), Span(3, 4))),
    ]
    (batch,) = pack(sequences, [0, 1], max_tokens=None, max_sequences=None, alignment=_whole(4))
    assert batch.input_ids.tolist() == [20, 21, 22, 23, 10, 11, 12, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert (batch.lengths, batch.sequence_indices, batch.num_tokens) == ((4, 3, 1), (1, 0), 7)
    # Position t is predicted from row t - 1: targets 21 (row 0), 23 (row 2), 12 (row 4 + 1).
    assert (batch.rows.tolist(), batch.targets.tolist(), batch.row_counts) == ([0, 2, 5], [21, 23, 12], (2, 1))
    assert batch.join([torch.tensor([3.0]), torch.tensor([1.0, 2.0])]).tolist() == [1.0, 2.0, 3.0]


def test_a_pack_over_two_context_parallel_ranks_by_hand() -> None:
    # Each sequence is padded to a multiple of 4: 5 to 8, 3 to 4. Chunks of 2 and of 1; rank 0 has the outer ones.
    sequences = [
        SpannedSequence(torch.tensor([10, 11, 12]), (Span(1, 3),)),
        SpannedSequence(torch.tensor([20, 21, 22, 23, 24]), (Span(1, 2), Span(3, 5))),
    ]
    outer, inner = (
        pack(sequences, [0, 1], max_tokens=None, max_sequences=None, alignment=Alignment(4, 4, 2, rank))[0]
        for rank in range(2)
    )
    assert outer.input_ids.tolist() == [20, 21, 0, 0, 10, 0]
    assert inner.input_ids.tolist() == [22, 23, 24, 0, 11, 12]
    assert outer.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert inner.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    for batch in (outer, inner):  # what belongs to the whole pack is the same on both
        assert (batch.lengths, batch.sequence_indices, batch.num_tokens) == ((8, 4), (1, 0), 8)
        assert batch.row_counts == (3, 2)
    # Rows 0 to 4 predict 21, 23, 24 (from 20, 22, 23), 11 and 12 (from 10 and 11).
    assert (outer.rows.tolist(), outer.targets.tolist(), outer.own_rows.tolist()) == ([0, 4], [21, 11], [0, 3])
    assert (inner.rows.tolist(), inner.targets.tolist(), inner.own_rows.tolist()) == (
        [0, 1, 4],
        [23, 24, 12],
        [1, 2, 4],
    )


def test_fp8_pads_the_pack_beside_context_parallelism_by_hand() -> None:
    # Sequences of 3 and 5 tokens, padded to 4 and 8 as above; a pack's 12 tokens are then padded to 16 in a piece of
    # its own, of which each rank has half, as of every sequence.
    sequences = random_sequences(97, lengths=[5, 3])
    for rank in range(2):
        (batch,) = pack(sequences, [0, 1], max_tokens=None, max_sequences=None, alignment=Alignment(16, 4, 2, rank))
        assert (batch.lengths, batch.sequence_indices, batch.num_tokens) == ((8, 4, 4), (0, 1), 8)
        assert batch.input_ids.numel() == 8
        assert batch.position_ids[-2:].tolist() == [[0, 3], [1, 2]][rank]


def _alignments(units: tuple[int, ...], *layouts: LayoutConfig) -> list[tuple[int, int]]:
    aligned = [alignment_of(build_layout(layout), token_multiple=unit) for layout in layouts for unit in units]
    return [(alignment.pack, alignment.sequence) for alignment in aligned]


def test_alignment_by_layout_and_by_what_fp8_needs() -> None:
    # Without FP8 (1), blockwise (128): a rank's part of the pack must be a multiple, also after sp has split it in two.
    layouts = (LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2), LayoutConfig(cp=2))
    expected = [(1, 1), (128, 1), (2, 1), (256, 1), (1, 1), (128, 1), (4, 4), (256, 4)]
    assert run_ranks(_alignments, 2, (1, 128), *layouts) == [expected] * 2


def test_an_empty_batch_has_tokens_on_every_context_parallel_rank() -> None:
    for rank in range(2):
        batch = empty_batch(Alignment(8, 8, 2, rank))
        assert (batch.input_ids.numel(), batch.lengths, batch.rows.numel()) == (4, (8,), 0)
        assert batch.own_rows is not None
        assert batch.own_rows.numel() == 0


@settings(max_examples=60, deadline=None)
@given(
    lengths=_LENGTHS,
    max_tokens=st.none() | st.integers(1, 60),
    max_sequences=st.none() | st.integers(1, 5),
    alignment=st.integers(1, 8),
)
def test_every_sequence_is_in_one_pack_whole(
    lengths: list[int], max_tokens: int | None, max_sequences: int | None, alignment: int
) -> None:
    sequences = random_sequences(97, lengths=lengths)
    indices = list(range(0, len(lengths), 2))
    batches = pack(sequences, indices, max_tokens=max_tokens, max_sequences=max_sequences, alignment=_whole(alignment))
    assert sorted(index for batch in batches for index in batch.sequence_indices) == indices
    for batch in batches:
        assert batch.input_ids.numel() == sum(batch.lengths)
        assert batch.input_ids.numel() % alignment == 0
        assert len(batch.lengths) - len(batch.sequence_indices) in (0, 1)
        assert max_sequences is None or len(batch.sequence_indices) <= max_sequences
        alone = len(batch.sequence_indices) == 1
        assert max_tokens is None or alone or batch.num_tokens <= max_tokens
        parts = torch.split(batch.input_ids, list(batch.lengths))
        for index, part in zip(batch.sequence_indices, parts, strict=False):
            assert torch.equal(part, sequences[index].token_ids)
        assert torch.equal(batch.input_ids[batch.rows + 1], batch.targets)


@settings(max_examples=60, deadline=None)
@given(lengths=_LENGTHS, dp=st.integers(1, 5))
def test_shares_partition_the_work_evenly(lengths: list[int], dp: int) -> None:
    sequences = random_sequences(97, lengths=lengths)
    shares = partition_by_flops(sequences, dp, _QWEN_7B)
    assert len(shares) == dp
    assert sorted(index for part in shares for index in part) == list(range(len(lengths)))
    assert shares == partition_by_flops(sequences, dp, _QWEN_7B)
    assert max(map(len, shares)) <= -(-len(lengths) // dp)


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    # Work in millions: 5,000 tokens 30, 3,000 tokens 12, 2,000 tokens 6, 1,000 tokens 2. By tokens 5,000 + 2,000
    # against 3,000 + 3,000 + 1,000 would be even, by work it is 36 against 26. Heaviest first: 30 + 2 against
    # 12 + 12 + 6.
    assert partition([30, 12, 12, 6, 2], 2) == [[0, 4], [1, 2, 3]]
    lengths = (50_000, 30_000, 30_000, 20_000, 10_000)  # where attention outweighs the products of a 7 B model
    sequences = [SpannedSequence(torch.zeros(length, dtype=torch.int64), ()) for length in lengths]
    assert partition_by_flops(sequences, 2, _QWEN_7B) == [[0, 4], [1, 2, 3]]


def test_wanted_rows_weigh(tmp_path: Path) -> None:
    """Of equal lengths, those whose every token reaches the output layer are the heavier ones."""
    folder = tiny_hf_model(tmp_path, "llama", tied=False, vocab_size=997, hidden_size=8, head_dim=4, num_heads=2)
    ids = torch.zeros(10, dtype=torch.int64)
    wanted, bare = SpannedSequence(ids, (Span(1, 10),)), SpannedSequence(ids, (Span(9, 10),))
    assert partition_by_flops([wanted, wanted, bare, bare], 2, Architecture.from_folder(folder)) == [[0, 2], [1, 3]]
    assert partition_by_flops([wanted, bare, bare, bare], 2, Architecture.from_folder(folder)) == [[0, 3], [1, 2]]


def test_the_heaviest_replica_of_a_skewed_batch_has_at_most_3_percent_more_than_the_mean() -> None:
    # 64 completions whose lengths are log-normal between 100 and 2,000: cut in order of
    # length, the heaviest of 4 replicas has 2.1 times the mean.
    normal = statistics.NormalDist(math.log(100 * 2000) / 2, math.log(2000 / 100) / 4)
    lengths = [round(math.exp(normal.inv_cdf((index + 0.5) / 64))) for index in range(64)]
    sequences = [
        SpannedSequence(torch.zeros(length, dtype=torch.int64), (Span(length // 10, length),)) for length in lengths
    ]
    work = [scoring_flops(_QWEN_7B, [sequence]) for sequence in sequences]
    for dp, bound in ((2, 1.001), (4, 1.01), (8, 1.03)):
        loads = [sum(work[index] for index in indices) for indices in partition_by_flops(sequences, dp, _QWEN_7B)]
        assert max(loads) <= bound * sum(loads) / dp


def test_packs_are_as_even_as_their_number_allows() -> None:
    # First-fit would fill (9, 8), (2, 1): the same two packs, but a peak of 17 tokens instead of 10.
    sequences = random_sequences(97, lengths=[9, 1, 8, 2])
    for limits in ({"max_tokens": None, "max_sequences": 2}, {"max_tokens": 17, "max_sequences": None}):
        batches = pack(sequences, range(4), alignment=_whole(1), **limits)
        assert [batch.sequence_indices for batch in batches] == [(0, 1), (2, 3)]
    # Where even packs would break the budget, first-fit's stand: 6, 6 | 4, 4, 4 fill two packs of 12.
    sequences = random_sequences(97, lengths=[6, 6, 4, 4, 4])
    batches = pack(sequences, range(5), max_tokens=12, max_sequences=None, alignment=_whole(1))
    assert [batch.lengths for batch in batches] == [(6, 6), (4, 4, 4)]


@pytest.mark.parametrize("alignment", [1, 4])
def test_an_empty_batch_is_padding_only(alignment: int) -> None:
    batch = empty_batch(_whole(alignment))
    assert (batch.input_ids.numel(), batch.num_tokens, batch.rows.numel()) == (alignment, 0, 0)
    assert batch.lengths == (alignment,)
    assert batch.row_counts == ()
