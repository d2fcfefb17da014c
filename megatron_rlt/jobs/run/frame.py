"""Measures and logs numbered steps or parts: times, rates and memory to `metrics.jsonl`, progress to people."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_rlt.config.commands.job import MetricsConfig
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.memory import MemoryLedger
from megatron_rlt.metrics.phases import PhaseTimer, peak_flops_per_second, rates
from megatron_rlt.metrics.progress import Progress
from megatron_rlt.metrics.reduce import largest
from megatron_rlt.metrics.writer import MetricsWriter
from megatron_rlt.parallel.platform import device_name, world
from megatron_rlt.visible_text import one_line

Record = Callable[[int, dict[str, float]], dict[str, float]]
"""Logs the metrics of the step or part with this number, from 1; returns them with those measured. Collective."""


class _Lines(logging.Formatter):
    """One line a message, whatever ids and texts it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        return one_line(super().formatMessage(record))


def log_to_stdout() -> None:
    """Print this package's log on the first rank."""
    if dist.get_rank() == 0:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Lines("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("megatron_rlt").setLevel(logging.INFO)


class RunFrame:
    """Measures and logs the steps or parts of one process."""

    def __init__(self, metrics: MetricsConfig, heartbeat: Heartbeat) -> None:
        self._metrics, self._heartbeat = metrics, heartbeat
        self.memory = MemoryLedger()
        self.timer = PhaseTimer(heartbeat=self._begin_phase, memory=self.memory)
        self._progress: Progress | None = None

    @contextmanager
    def pieces(
        self, title: str, folder: Path, *, piece: str, num_done: int, count: int, shown: Sequence[str]
    ) -> Iterator[Record]:
        """Yield the function that logs each step or part.

        Args:
            title: name of the run in the progress display.
            folder: receives the metrics, one line per step or part.
            piece: "step" or "part", as the progress display calls it.
            shown: names of the metrics to display, where they exist.
        """
        is_first, options = dist.get_rank() == 0, self._metrics
        sinks = {"tensorboard": options.tensorboard, "wandb": options.wandb}
        writer = MetricsWriter(folder, is_writer=is_first, resumed_step=num_done, **sinks)
        console = Console() if options.progress else None
        self._progress = Progress(
            title=title, piece=piece, first_step=num_done, num_steps=count, console=console, is_reporter=is_first
        )

        def record(number: int, metrics: dict[str, float]) -> dict[str, float]:
            metrics = metrics | self._measured()
            writer.log(number, metrics)
            progress.finish_step(number, {name: metrics[name] for name in shown if name in metrics})
            return metrics

        with self._progress as progress:
            yield record
        writer.close()

    def _measured(self) -> dict[str, float]:
        """Times, work, rates and memory since the last call, maxima over ranks. Collective."""
        measured = largest(self.timer.take() | self.memory.take(), world())
        peak = peak_flops_per_second(self._metrics.peak_flops_per_second, device_name())
        return measured | rates(measured, num_devices=dist.get_world_size(), peak_flops_per_second=peak)

    def _begin_phase(self, name: str) -> None:
        self._heartbeat.beat(name)
        if self._progress is not None:
            self._progress.show_phase(name)
