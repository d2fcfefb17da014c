"""Collectives on Python objects, for records outside Megatron's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar, cast

import torch.distributed as dist

from megatron_rlt.types import OnProgress

T = TypeVar("T")


def gather_by_index(mine: Mapping[int, T], total: int, group: dist.ProcessGroup) -> list[T]:
    """All ranks' results in index order, on every rank; exactly one rank must bring each index of `range(total)`."""
    parts: list[Mapping[int, T]] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(parts, mine, group=group)
    merged = {index: result for part in parts for index, result in part.items()}
    assert len(merged) == total == sum(len(part) for part in parts), "each item must be computed by exactly one rank"
    return [merged[index] for index in range(total)]


def broadcast_record(record: T, *, source_rank: int, group: dist.ProcessGroup) -> T:
    """Broadcast global rank `source_rank`'s record to every rank of `group`."""
    box: list[T] = [record]
    if group.size() > 1:
        dist.broadcast_object_list(box, src=source_rank, group=group)
    return box[0]


_POLL_SECONDS = 0.2  # between two progress reports of `on_first_rank`


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup, on_progress: OnProgress, doing: str) -> T:
    """Run `work` on the group's first rank (such as an HTTP request); broadcast its result or exception to all ranks.

    Args:
        work: runs in a thread of the first rank; it must not call a collective.
        on_progress: called with `doing` repeatedly on every rank, so that a wait does not look like a hang.
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
    """Result or error of finished work; None while it runs."""
    if future is None or not wait([future], timeout=_POLL_SECONDS).done:
        return None
    error = future.exception()
    return (future.result(), None) if error is None else (None, error)
