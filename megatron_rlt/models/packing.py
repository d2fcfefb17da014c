"""Sequences to packs: several sequences end to end in one call of a model, and the share of each replica.

In: the step's sequences. Out: `PackedBatch`es. The one owner of alignment: trailing padding becomes a
pseudo-sequence of its own, so that attention never mixes it with tokens and no score depends on it. With context
parallelism every sequence has padding behind it instead, which none of its tokens sees, and a rank's batch holds its
part of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlt.models.zigzag import zigzag_part
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.types import PackedBatch, SpannedSequence

# Tokens at which a layer's attention costs as much as its matrix products: 12 x hidden size, here that of a model
# of 3 to 4 B parameters. Only balance depends on it.
_ATTENTION_EVEN_TOKENS = 12 * 2560


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
    """Pack `sequences[i]` for every `i` of `indices`: longest first, each into the first pack with room for it.

    Args:
        indices: which sequences; they become the packs' `sequence_indices`.
        max_tokens: token budget of a pack before alignment; a longer sequence gets a pack of its own. None: no limit.
        max_sequences: most sequences in one pack. None: no limit.
        alignment: see `alignment_of`.
    """
    packs: list[list[int]] = []
    sizes: list[int] = []
    for index in sorted(indices, key=lambda i: (-len(sequences[i]), i)):
        length = len(sequences[index])
        assert length > 0, "an empty sequence cannot be packed"
        for number, members in enumerate(packs):
            full = max_sequences is not None and len(members) >= max_sequences
            if not full and (max_tokens is None or sizes[number] + length <= max_tokens):
                members.append(index)
                sizes[number] += length
                break
        else:
            packs.append([index])
            sizes.append(length)
    return [_join(sequences, members, alignment) for members in packs]


def empty_batch(alignment: Alignment) -> PackedBatch:
    """A batch of padding only, for a replica that has no work while others wait for it in a collective."""
    return _join([], [], alignment)


def share(sequences: Sequence[SpannedSequence], dp: int) -> list[list[int]]:
    """Split indices over `dp` replicas by work: heaviest first, each to the least loaded replica with room.

    Work is tokens plus attention's quadratic term; no replica gets more than ceil(n / dp) sequences. Each
    replica's indices ascend; a replica may get none.
    """
    return share_by_work([work_of(len(sequence)) for sequence in sequences], dp)


def share_by_work(work: Sequence[float], dp: int) -> list[list[int]]:
    """As `share`, for items whose work is known."""
    most = -(-len(work) // dp)
    shares: list[list[int]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        replica = min((r for r in range(dp) if len(shares[r]) < most), key=lambda r: (loads[r], r))
        shares[replica].append(index)
        loads[replica] += work[index]
    return [sorted(indices) for indices in shares]


def work_of(num_tokens: int) -> float:
    """Work of one sequence, in units of one token's matrix products."""
    return num_tokens * (1.0 + num_tokens / _ATTENTION_EVEN_TOKENS)


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
