"""What every rank does alone but all must succeed in: a block that fails on one rank fails on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def all_or_none(action: str) -> Iterator[None]:
    """Run a block on every rank; when it raised anywhere, raise everywhere. Collective on the whole job.

    The block must hold no collective: a rank that failed would leave the others waiting in it.

    Args:
        action: what the block does, for the message: "writing rank state".

    Raises:
        RuntimeError: the block failed on other ranks; it names them. The failing rank raises its own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - kept, told to the other ranks, and raised again below
        failure = error
    report = None if failure is None else f"{type(failure).__name__}: {failure}"
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
    if failed:
        raise RuntimeError(f"{action} failed on {'; '.join(failed)}")
