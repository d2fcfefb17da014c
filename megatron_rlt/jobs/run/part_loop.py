"""Runs a job in parts: continues after the parts that exist, and ends on request between two parts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.commands.job import MetricsConfig
from megatron_rlt.jobs.run.frame import RunFrame
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.validate_rows import RowReport, write_rejected
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.store.parts import PartStore

_ADDED_UP = ("seconds/", "tokens/")

TakePart = Callable[[int, PhaseTimer], dict[str, float]]
"""Computes and writes part `number` (from 0); returns its metrics, equal on every rank. Collective."""

logger = logging.getLogger(__name__)


class PartRun:
    """One process of a job that works in parts."""

    def __init__(self, metrics: MetricsConfig, *, heartbeat: Heartbeat, end: EndRequest) -> None:
        self._metrics, self._heartbeat, self._end = metrics, heartbeat, end
        self.totals: Counter[str] = Counter()  # seconds and tokens by phase, named as in `PhaseTimer`

    def begin(self, stores: Sequence[PartStore], report: RowReport, rejected: Path, *, asked: str) -> tuple[int, ...]:
        """Write the rejected rows and create the part folders; returns the number of parts in each. Collective.

        `asked` describes the work on the usable rows for the log.
        """
        counts: tuple[int, ...] = ()
        if dist.get_rank() == 0:
            write_rejected(rejected, report)
            logger.info("%s, %s", asked, report.describe_rejected(rejected))
            counts = tuple(store.begin() for store in stores)
            if any(counts):
                done = (f"{count} parts in {store.folder}" for count, store in zip(counts, stores, strict=True))
                logger.info("done already: %s", ", ".join(done))
        return broadcast_record(counts, source_rank=0, group=world())

    def run(
        self, take_part: TakePart, *, title: str, folder: Path, num_done: int, num_parts: int, shown: tuple[str, ...]
    ) -> bool:
        """Do the remaining parts; returns False if the run was ended by request before the last. Collective.

        `title`, `folder` and `shown` as in `RunFrame.pieces`.
        """
        frame = RunFrame(self._metrics, self._heartbeat)
        with frame.pieces(title, folder, piece="part", num_done=num_done, count=num_parts, shown=shown) as record:
            for number in range(num_done, num_parts):
                if self._end.agreed(num_saves=0):
                    logger.info("ended on request; the same command continues after part %d", number)
                    return False
                with self._end.step(number + 1):
                    metrics = record(number + 1, take_part(number, frame.timer))
                self.totals.update({name: value for name, value in metrics.items() if name.startswith(_ADDED_UP)})
        return True
