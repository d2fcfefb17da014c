"""Small collectives on Python records: what travels between ranks outside Megatron's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar, cast

import torch.distributed as dist

from megatron_rlt.types import OnProgress

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


# Between two signs of life of a rank that waits for the first one's answer from outside.
_BEAT_SECONDS = 0.2


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup, on_progress: OnProgress, doing: str) -> T:
    """Do on the group's first rank what only one can do, such as asking a server, while all ranks wait with it.

    Args:
        work: runs in a thread of the first rank; it must not call a collective.
        on_progress: told `doing` again and again on every rank: waiting is not hanging.

    Returns:
        What `work` returned, on every rank.

    Raises:
        Exception: what `work` raised, on every rank.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if group.rank() == 0 else None
        while True:
            on_progress(doing)
            outcome = broadcast_record(_outcome(future), source_rank=dist.get_global_rank(group, 0), group=group)
            if outcome is not None:
                break
    result, error = outcome
    if error is not None:
        raise error
    return cast(T, result)


def _outcome(future: Future[T] | None) -> tuple[T, None] | tuple[None, BaseException] | None:
    """Result or error of finished work; None while it goes on."""
    if future is None or not wait([future], timeout=_BEAT_SECONDS).done:
        return None
    error = future.exception()
    return (future.result(), None) if error is None else (None, error)
