"""Sequences to packs: several sequences end to end in one call of a model, and the share of each replica.

In: the step's sequences. Out: `PackedBatch`es. The one owner of alignment: trailing padding becomes a
pseudo-sequence of its own, so that attention never mixes it with tokens and no score depends on it. With context
parallelism every sequence has padding behind it instead, which none of its tokens sees, and a rank's batch holds its
part of each.
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
from megatron_rlt.types import PackedBatch, SpannedSequence


@dataclass(frozen=True)
class Alignment:
    """What a layout asks of a pack, and which part of it is this rank's."""

    multiple: int  # of a pack's tokens; with cp > 1 of each sequence's
    cp: int
    cp_rank: int


def alignment_of(layout: Layout) -> Alignment:
    """Sequence parallelism cuts a rank's tokens into tp equal parts, context parallelism a sequence into 2 x cp."""
    tokens = layout.tp if layout.sp else 1
    return Alignment(tokens if layout.cp == 1 else tokens * 2 * layout.cp, layout.cp, layout.cp_rank)


def pack(
    sequences: Sequence[SpannedSequence],
    indices: Sequence[int],
    *,
    max_tokens: int | None,
    max_sequences: int | None,
    alignment: Alignment,
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


def empty_batch(alignment: Alignment) -> PackedBatch:
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


def _join(sequences: Sequence[SpannedSequence], members: list[int], alignment: Alignment) -> PackedBatch:
    chosen = [sequences[index] for index in members]
    ids = [sequence.token_ids for sequence in chosen]
    pieces = _padded_together(ids, alignment.multiple) if alignment.cp == 1 else _padded(ids, alignment.multiple)
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


def _padded_together(ids: list[Tensor], multiple: int) -> list[Tensor]:
    """The sequences and, if need be, a last one of padding."""
    num_tokens = sum(len(sequence) for sequence in ids)
    padding = -num_tokens % multiple if num_tokens else multiple
    return [*ids, torch.zeros(padding, dtype=torch.int64)] if padding else ids


def _padded(ids: list[Tensor], multiple: int) -> list[Tensor]:
    """Each sequence with padding behind it, which its own tokens do not see: attention is causal."""
    return [F.pad(sequence, (0, -len(sequence) % multiple)) for sequence in ids] or [
        torch.zeros(multiple, dtype=torch.int64)
    ]


def _part_of_rank(batch: PackedBatch, alignment: Alignment) -> PackedBatch:
    """This context-parallel rank's tokens of every sequence, and the wanted rows among them."""
    pieces = torch.split(torch.arange(batch.input_ids.numel()), list(batch.lengths))
    positions = torch.cat([zigzag_part(piece, alignment.cp, alignment.cp_rank) for piece in pieces])
    places = torch.full_like(batch.input_ids, -1)  # of the pack's tokens in this rank's part
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
