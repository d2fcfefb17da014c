"""The frame around a job that works in parts: phases, metrics, progress, ending on request between two parts.

In: a function that does one part and says what came of it. Out: whether all parts are done. Where the rows of a part
go, and how a run finds the parts that are there, is the job's and `store/parts.py`'s.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.config.sections import MetricsConfig
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer, peak_flops_per_second, rates
from megatron_rlt.metrics.progress import Progress
from megatron_rlt.metrics.reduce import largest
from megatron_rlt.metrics.writer import MetricsWriter
from megatron_rlt.parallel.platform import device_name, world

_ADDED_UP = ("seconds/", "tokens/")


TakePart = Callable[[int, PhaseTimer], dict[str, float]]
"""Does the part of a number (from 0), writes it, and returns its metrics, the same on every rank. Collective."""


logger = logging.getLogger(__name__)


class PartRun:
    """One start of work in parts."""

    def __init__(
        self, title: str, folder: Path, metrics: MetricsConfig, *, heartbeat: Heartbeat, end: EndRequest
    ) -> None:
        """
        Args:
            title: what runs, for people.
            folder: where the metrics go, a line a part.
        """
        self._title, self._folder, self._metrics = title, folder, metrics
        self._heartbeat, self._end = heartbeat, end
        self._memory = MemoryLedger()
        self.totals: Counter[str] = Counter()  # seconds and tokens of this start by phase, as `PhaseTimer` names them

    def run(self, take_part: TakePart, *, num_done: int, num_parts: int, shown: tuple[str, ...]) -> bool:
        """Do the parts that are not done yet; False if the run was asked to end before the last. Collective.

        Args:
            shown: metrics that a person watches.
        """
        is_reporter = dist.get_rank() == 0
        writer = MetricsWriter(
            self._folder,
            is_writer=is_reporter,
            resumed_step=num_done,
            tensorboard=self._metrics.tensorboard,
            wandb=self._metrics.wandb,
        )
        progress = Progress(
            title=self._title,
            first_step=num_done,
            num_steps=num_parts,
            console=Console() if self._metrics.progress else None,
            is_reporter=is_reporter,
        )

        def begin_phase(name: str) -> None:
            self._heartbeat.beat(name)
            progress.show_phase(name)

        timer = PhaseTimer(heartbeat=begin_phase, memory=self._memory)
        with progress:
            for number in range(num_done, num_parts):
                if self._end.agreed():
                    writer.close()
                    logger.info("ended on request; the same command continues after part %d", number)
                    return False
                metrics = take_part(number, timer)
                metrics |= self._measured(timer)
                self.totals.update({name: value for name, value in metrics.items() if name.startswith(_ADDED_UP)})
                writer.log(number + 1, metrics)
                progress.finish_step(number + 1, {name: metrics[name] for name in shown})
        writer.close()
        return True

    def _measured(self, timer: PhaseTimer) -> dict[str, float]:
        """Times, work, rates and memory of the part that ended, of the slowest or fullest rank. Collective."""
        measured = largest(timer.take() | self._memory.take(), world())
        peak = peak_flops_per_second(self._metrics.peak_flops_per_second, device_name())
        return measured | rates(measured, num_devices=dist.get_world_size(), peak_flops_per_second=peak)
