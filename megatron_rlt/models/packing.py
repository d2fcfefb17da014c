"""Sequences to packs: several sequences end to end in one call of a model, and the share of each replica.

In: the step's sequences. Out: `PackedBatch`es. The one owner of alignment: trailing padding becomes a
pseudo-sequence of its own, so that attention never mixes it with tokens and no score depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_rlt.models.architecture import Architecture
from megatron_rlt.models.flops import scoring_flops
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.types import PackedBatch, SpannedSequence


def alignment_of(layout: Layout) -> int:
    """What a pack's number of tokens must be a multiple of: sequence parallelism cuts it into tp equal parts."""
    return layout.tp if layout.sp else 1


def pack(
    sequences: Sequence[SpannedSequence],
    indices: Sequence[int],
    *,
    max_tokens: int | None,
    max_sequences: int | None,
    alignment: int,
) -> list[PackedBatch]:
    """Pack `sequences[i]` for every `i` of `indices`: into as few packs as first-fit needs, as even as they can be.

    Even packs of the same number: the largest sets the peak of memory, in training that of all activations.

    Args:
        indices: which sequences; they become the packs' `sequence_indices`.
        max_tokens: token budget of a pack before alignment; a longer sequence gets a pack of its own. None: no limit.
        max_sequences: most sequences in one pack. None: no limit.
        alignment: see `alignment_of`.
    """
    lengths = {index: len(sequences[index]) for index in sorted(indices, key=lambda i: (-len(sequences[i]), i))}
    assert all(lengths.values()), "an empty sequence cannot be packed"
    token_limit = math.inf if max_tokens is None else max_tokens
    count_limit = math.inf if max_sequences is None else max_sequences
    packs = _first_fit(lengths, token_limit, count_limit)
    packs = _evenly(lengths, len(packs), token_limit, count_limit) or packs
    return [_join(sequences, members, alignment) for members in packs]


def _first_fit(lengths: dict[int, int], token_limit: float, count_limit: float) -> list[list[int]]:
    """Longest first, each into the first pack with room for it."""
    packs: list[list[int]] = []
    sizes: list[int] = []
    for index, length in lengths.items():
        for number, members in enumerate(packs):
            if len(members) < count_limit and sizes[number] + length <= token_limit:
                members.append(index)
                sizes[number] += length
                break
        else:
            packs.append([index])
            sizes.append(length)
    return packs


def _evenly(lengths: dict[int, int], num_packs: int, token_limit: float, count_limit: float) -> list[list[int]] | None:
    """Longest first, each into the smallest pack with a place for it; None if that breaks the token budget."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sizes = [0] * num_packs
    for index, length in lengths.items():
        number = min((n for n in range(num_packs) if len(packs[n]) < count_limit), key=lambda n: (sizes[n], n))
        if packs[number] and sizes[number] + length > token_limit:
            return None
        packs[number].append(index)
        sizes[number] += length
    return packs


def empty_batch(alignment: int) -> PackedBatch:
    """A batch of padding only, for a replica that has no work while others wait for it in a collective."""
    return _join([], [], alignment)


def share(sequences: Sequence[SpannedSequence], dp: int, architecture: Architecture) -> list[list[int]]:
    """Split indices over `dp` replicas by model FLOP, see `share_by_work`: attention and output rows count.

    A backward pass does twice as much of each, so the same shares balance training.
    """
    return share_by_work([scoring_flops(architecture, [sequence]) for sequence in sequences], dp)


def share_by_work(work: Sequence[float], dp: int) -> list[list[int]]:
    """Split indices over `dp` replicas: heaviest first, each to the least loaded replica with room.

    No replica gets more than ceil(n / dp) sequences, which keeps the number of micro-batches what the plan says.
    Each replica's indices ascend; a replica may get none.
    """
    most = -(-len(work) // dp)
    shares: list[list[int]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        replica = min((r for r in range(dp) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[replica].append(index)
        loads[replica] += work[index]
    return [sorted(indices) for indices in shares]


def _join(sequences: Sequence[SpannedSequence], members: list[int], alignment: int) -> PackedBatch:
    chosen = [sequences[index] for index in members]
    lengths = [len(sequence) for sequence in chosen]
    num_tokens = sum(lengths)
    padding = -num_tokens % alignment if num_tokens else alignment
    ids = [sequence.token_ids for sequence in chosen]
    rows, start = [], 0
    for sequence in chosen:
        rows.append(start + sequence.target_positions - 1)
        start += len(sequence)
    if padding:
        ids.append(torch.zeros(padding, dtype=torch.int64))
        lengths.append(padding)
    nothing = [torch.empty(0, dtype=torch.int64)]
    return PackedBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lengths=tuple(lengths),
        sequence_indices=tuple(members),
        rows=torch.cat(rows or nothing),
        targets=torch.cat([sequence.token_ids[sequence.target_positions] for sequence in chosen] or nothing),
        row_counts=tuple(sequence.num_targets for sequence in chosen),
    )
