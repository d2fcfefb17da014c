"""One start of a command: alone on what it writes, without what killed starts left there, its disk faults one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch.distributed as dist

from megatron_rlt.config.commands.job import CommandConfig, JobConfig
from megatron_rlt.disk_faults import DiskError, disk_refusals
from megatron_rlt.folder_lock import LockedError, locked_beside, locked_folder
from megatron_rlt.launch.progress import link_latest_attempt
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.types import StoppedError
from megatron_rlt.whole_files import sweep, sweep_beside

Config = TypeVar("Config", bound=CommandConfig)
Ranked = TypeVar("Ranked", bound=JobConfig)


def start_alone(job: Callable[[Config], object], config: Config) -> None:
    """Run a command of one process. Raises ValueError if another start writes what it would write."""
    with disk_refusals(), _owned(config):
        job(config)


def start_on_rank(job: Callable[[Ranked, Heartbeat], int], config: Ranked, heartbeat: Heartbeat) -> int:
    """Run a command's share of this rank; the first holds the locks. Collective.

    Raises ValueError on all ranks as `start_alone` does, and StoppedError for what the disk refuses.
    """
    try:
        with disk_refusals(), ExitStack() as stack:
            locked: str | None = None
            if dist.get_rank() == 0:
                try:
                    stack.enter_context(_owned(config))
                except LockedError as error:
                    locked = str(error)
            if (locked := broadcast_record(locked, source_rank=0, group=world())) is not None:
                raise LockedError(locked)
            return job(config, heartbeat)
    except DiskError as error:
        raise StoppedError(str(error)) from error


@contextmanager
def _owned(config: CommandConfig) -> Iterator[None]:
    """Hold the locks of all that a command writes, in an order that is the same for all commands."""
    with ExitStack() as stack:
        if isinstance(config, JobConfig):
            stack.enter_context(locked_folder(config.output_dir))
            sweep(config.output_dir)
            link_latest_attempt(config.output_dir)
        for file in sorted(config.written_files()):
            stack.enter_context(locked_beside(file))
            sweep_beside(file)
        yield
