"""Sequences to packs: several sequences end to end in one call of a model, and the share of each replica.

In: the step's sequences. Out: `PackedBatch`es. The one owner of alignment: trailing padding becomes a
pseudo-sequence of its own, so that attention never mixes it with tokens and no score depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rlt.parallel.layout import Layout
from megatron_rlt.types import PackedBatch, SpannedSequence

# Tokens at which a layer's attention costs as much as its matrix products: 12 x hidden size, here that of a model
# of 3 to 4 B parameters. Only balance depends on it.
_ATTENTION_EVEN_TOKENS = 12 * 2560


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


def empty_batch(alignment: int) -> PackedBatch:
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
