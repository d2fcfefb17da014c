"""Small collectives on Python records: what travels between ranks outside Megatron's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_by_index(mine: Mapping[int, T], total: int, group: dist.ProcessGroup) -> list[T]:
    """Collect the results of work that was split over `group`.

    Args:
        mine: this rank's results by the index of the item they belong to.
        total: number of items; every index in `range(total)` must come from exactly one rank.

    Returns:
        All results in index order, the same on every rank of the group.
    """
    parts: list[Mapping[int, T]] = [{}] * group.size()
    if group.size() == 1:
        parts = [mine]
    else:
        dist.all_gather_object(parts, mine, group=group)
    merged = {index: result for part in parts for index, result in part.items()}
    assert len(merged) == total == sum(len(part) for part in parts), "each item must be computed by exactly one rank"
    return [merged[index] for index in range(total)]


def broadcast_record(record: T, *, source_rank: int, group: dist.ProcessGroup) -> T:
    """The record that global rank `source_rank` passed in, on every rank of `group`."""
    if group.size() == 1:
        return record
    box: list[T] = [record]
    dist.broadcast_object_list(box, src=source_rank, group=group)
    return box[0]
