"""Packs sequences end to end for one model call, and splits them over data-parallel replicas.

In: the step's sequences. Out: `PackedBatch`es. Trailing padding for alignment is a separate pseudo-sequence, so that no
token attends to it. With context parallelism each sequence is padded at its end too, and a rank's batch holds its part
of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.flops import scoring_flops
from megatron_rlt.models.zigzag import zigzag_part
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.types import SpannedSequence


@dataclass(frozen=True)
class Alignment:
    """What must divide lengths in a layout, and this rank's part of them."""

    pack: int  # divides a pack's tokens
    sequence: int  # divides each sequence's padded length; divides `pack`
    cp: int
    cp_rank: int


def alignment_of(layout: Layout, *, token_multiple: int) -> Alignment:
    """Sequence parallelism splits a rank's tokens into tp equal parts, context parallelism a sequence into 2 x cp.

    `token_multiple`: what must divide a part's tokens, `LanguageModel.token_multiple`.
    """
    parts = layout.tp if layout.sp else 1
    sequence = 1 if layout.cp == 1 else parts * 2 * layout.cp
    return Alignment(math.lcm(sequence, token_multiple * parts * layout.cp), sequence, layout.cp, layout.cp_rank)


def pack(
    sequences: Sequence[SpannedSequence],
    indices: Sequence[int],
    *,
    max_tokens: int | None,
    max_sequences: int | None,
    alignment: Alignment,
) -> list[PackedBatch]:
    """Pack `sequences[i]` for every `i` of `indices` into as few packs as first-fit needs, then even their sizes.

    Even packs lower peak memory, which the largest pack sets.

    Args:
        max_tokens: token budget per pack before alignment; a longer sequence gets its own pack. None: no limit.
        max_sequences: sequences per pack at most. None: no limit.
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
    """Longest first, each into the smallest pack with room; None if that exceeds the token budget."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sizes = [0] * num_packs
    for index, length in lengths.items():
        number = min((n for n in range(num_packs) if len(packs[n]) < count_limit), key=lambda n: (sizes[n], n))
        if packs[number] and sizes[number] + length > token_limit:
            return None
        packs[number].append(index)
        sizes[number] += length
    return packs


def empty_batch(alignment: Alignment) -> PackedBatch:
    """A batch of padding only: a replica without work must still take part in collectives."""
    return _join([], [], alignment)


def partition_by_flops(sequences: Sequence[SpannedSequence], dp: int, architecture: Architecture) -> list[list[int]]:
    """`partition` by model FLOP of a forward pass; a backward pass is proportional, so this balances training too."""
    return partition([scoring_flops(architecture, [sequence]) for sequence in sequences], dp)


def partition(work: Sequence[float], dp: int) -> list[list[int]]:
    """Split indices over `dp` replicas, heaviest first, each to the least loaded replica with room.

    No replica gets more than ceil(n / dp) sequences, so that the plan's number of micro-batches holds. Each replica's
    indices ascend; a replica may get none.
    """
    most = -(-len(work) // dp)
    shares: list[list[int]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        replica = min((r for r in range(dp) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[replica].append(index)
        loads[replica] += work[index]
    return [sorted(indices) for indices in shares]


def _join(sequences: Sequence[SpannedSequence], members: list[int], alignment: Alignment) -> PackedBatch:
    chosen = [sequences[index] for index in members]
    ids = [sequence.token_ids for sequence in chosen]
    pieces = _padded(ids, alignment)
    starts = itertools.accumulate((len(piece) for piece in pieces), initial=0)
    rows = [start + sequence.target_positions - 1 for start, sequence in zip(starts, chosen, strict=False)]
    nothing = [torch.empty(0, dtype=torch.int64)]
    batch = PackedBatch(
        input_ids=torch.cat(pieces),
        position_ids=torch.cat([torch.arange(len(piece)) for piece in pieces]),
        lengths=tuple(len(piece) for piece in pieces),
        num_tokens=sum(len(sequence) for sequence in chosen),
        sequence_indices=tuple(members),
        rows=torch.cat(rows or nothing),
        targets=torch.cat([sequence.token_ids[sequence.target_positions] for sequence in chosen] or nothing),
        row_counts=tuple(sequence.num_targets for sequence in chosen),
        own_rows=None,
    )
    return batch if alignment.cp == 1 else _part_of_rank(batch, alignment)


def _padded(ids: list[Tensor], alignment: Alignment) -> list[Tensor]:
    """Each sequence right-padded, which causal attention hides from its tokens; then one of padding if needed."""
    pieces = [F.pad(sequence, (0, -len(sequence) % alignment.sequence)) for sequence in ids]
    num_tokens = sum(len(piece) for piece in pieces)
    padding = -num_tokens % alignment.pack if num_tokens else alignment.pack
    return [*pieces, torch.zeros(padding, dtype=torch.int64)] if padding else pieces


def _part_of_rank(batch: PackedBatch, alignment: Alignment) -> PackedBatch:
    """This context-parallel rank's tokens of every sequence, and the wanted rows among them."""
    pieces = torch.split(torch.arange(batch.input_ids.numel()), list(batch.lengths))
    positions = torch.cat([zigzag_part(piece, alignment.cp, alignment.cp_rank) for piece in pieces])
    places = torch.full_like(batch.input_ids, -1)  # index of each of the pack's tokens in this rank's part
    places[positions] = torch.arange(positions.numel())
    rows = places[batch.rows]
    own_rows = (rows >= 0).nonzero()[:, 0]
    return replace(
        batch,
        input_ids=batch.input_ids[positions],
        position_ids=batch.position_ids[positions],
        rows=rows[own_rows],
        targets=batch.targets[own_rows],
        own_rows=own_rows,
    )
