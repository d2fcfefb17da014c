"""Ends a run on SIGTERM or SIGUSR1, or before its job's time limit, on all ranks at the same step boundary."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_rlt.jobs.run.time_left import TimeLeft
from megatron_rlt.launch.progress import Progress
from megatron_rlt.launch.records import attempt_records
from megatron_rlt.parallel.environment import job_end


class EndRequest:
    """Records signals that request the end of the job. Create one per process, before the first step."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        self._received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        is_first = dist.get_rank() == 0
        self._time_left = TimeLeft(folder, end=job_end(), is_writer=is_first)
        records = attempt_records(folder)
        self._progress = Progress(folder) if records is not None and is_first else None
        if records is not None:
            records.mark_listening(dist.get_rank())

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is the step or part of this number, counted from 1."""
        started = time.monotonic()
        yield
        self._time_left.measure_step(time.monotonic() - started)
        if self._progress is not None:
            self._progress.finish_step(number)

    def measure_save(self, seconds: float) -> None:
        """Count a save that took so long, until its checkpoint was complete."""
        self._time_left.measure_save(seconds)

    def agreed(self, *, num_saves: int) -> bool:
        """Whether any rank received a signal, or has no time for a step. Collective: all end at the same step.

        `num_saves`: that must be complete after that step, before the job can end.
        """
        flag = torch.tensor([int(self._received or self._time_left.is_over(num_saves=num_saves))])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
