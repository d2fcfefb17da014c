"""Packing loses nothing, mixes nothing, and shares work evenly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.models.packing import Alignment, empty_batch, pack, share, work_of
from megatron_rlt.types import Span, SpannedSequence
from tests.models.dense import random_sequences

_LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def _whole(multiple: int) -> Alignment:
    return Alignment(multiple, cp=1, cp_rank=0)


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
        pack(sequences, [0, 1], max_tokens=None, max_sequences=None, alignment=Alignment(4, 2, rank))[0]
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


def test_an_empty_batch_has_tokens_on_every_context_parallel_rank() -> None:
    for rank in range(2):
        batch = empty_batch(Alignment(8, 2, rank))
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
    shares = share(sequences, dp)
    assert len(shares) == dp
    assert sorted(index for part in shares for index in part) == list(range(len(lengths)))
    assert shares == share(sequences, dp)
    assert max(map(len, shares)) <= -(-len(lengths) // dp)


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    # 2 x 20,000 tokens of attention cost more than 40,000 in short sequences, less than one of 40,000.
    assert 40 * work_of(1000) < 2 * work_of(20_000) < work_of(40_000)
    sequences = [SpannedSequence(torch.zeros(length, dtype=torch.int64), ()) for length in (8, 3, 3, 2)]
    assert share(sequences, 2) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("alignment", [1, 4])
def test_an_empty_batch_is_padding_only(alignment: int) -> None:
    batch = empty_batch(_whole(alignment))
    assert (batch.input_ids.numel(), batch.num_tokens, batch.rows.numel()) == (alignment, 0, 0)
    assert batch.lengths == (alignment,)
    assert batch.row_counts == ()
