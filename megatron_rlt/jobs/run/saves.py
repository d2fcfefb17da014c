"""The saves of a run: one after the other, while training waits or while it goes on, each measured.

In the background only the capture stops training. A save is complete before the next one begins, before the export and
before the command ends; a failure is raised at the next step boundary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.folders import CheckpointInfo
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import CapturedState, capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import SharedState
from megatron_rlt.config.training import CheckpointConfig
from megatron_rlt.jobs.run.signals import EndRequest
from megatron_rlt.jobs.run.training_state import SKIPPED, TrainingState
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.parallel.platform import group_of_a_thread, world

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    write: BackgroundWrite
    capture_seconds: float


class Saves:
    """Saves the training state of one run."""

    def __init__(
        self, config: CheckpointConfig, folder: Path, *, end: EndRequest, timer: PhaseTimer, timeout_seconds: float
    ) -> None:
        """
        Args:
            folder: of the run's checkpoints.
            end: learns how long saves take.
            timeout_seconds: for which ranks wait for each other in the background.
        """
        self._config, self._folder, self._end, self._timer = config, folder, end, timer
        self._group = group_of_a_thread(timeout_seconds=timeout_seconds) if config.background else None
        self._pending: _Pending | None = None
        self._metrics: dict[str, float] = {}

    @property
    def is_writing(self) -> bool:
        """Whether a save is not complete yet."""
        return self._pending is not None

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Complete the last save at the end of the block, also if the block fails: its steps need not be lost."""
        try:
            yield
        except Exception:
            if self._pending is not None and (error := self._pending.write.error()) is not None:
                logger.warning("step %d was not saved: %s", self._pending.write.step, error)
            raise
        self._finish()

    def save(self, state: TrainingState, step: int) -> None:
        """Save, or begin to save in the background, once the save before is complete. Collective."""
        self._finish()
        sampled_ahead = b""
        if state.ahead is not None:
            with self._timer.phase("rollout"):  # a resumed run no longer has the weights that sampled it
                sampled_ahead = state.ahead.state_bytes()
        started = time.monotonic()
        with self._timer.phase("checkpoint"), state.onloaded(changes=False):
            captured = self._capture(state, step, sampled_ahead)
            if self._group is None:
                info = write_training_state(captured, self._folder, keep_last=self._config.keep_last, group=world())
        seconds = time.monotonic() - started
        if self._group is None:
            self._count(info, seconds=seconds, stalled_seconds=seconds)
            return
        write = BackgroundWrite(captured, self._folder, keep_last=self._config.keep_last, group=self._group)
        self._pending = _Pending(write, seconds)

    def look(self) -> None:
        """Count a save that has ended in the background, or raise its failure. Collective: at a step boundary."""
        if self._pending is None:
            return
        ended = torch.tensor([int(self._pending.write.has_ended)])
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        if bool(ended):
            self._finish()

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the save that was completed since the last call, if any."""
        taken, self._metrics = self._metrics, {}
        return taken

    def _capture(self, state: TrainingState, step: int, sampled_ahead: bytes) -> CapturedState:
        policy = state.policy
        counters = {} if state.measured is None else state.measured.counters()
        counters |= {SKIPPED: policy.skipped_in_a_row}
        return capture_training_state(
            step,
            models=state.models,
            optimizer=policy.optimizer,
            scheduler=policy.scheduler,
            rank_state=RankState.capture(extra=b""),
            shared_state=SharedState(state.stream.state_bytes(), counters, sampled_ahead),
            num_updates=policy.num_updates,
            reshardable=self._config.reshardable,
            copy=self._config.background,
        )

    def _finish(self) -> None:
        """Wait for the save that is being written in the background, if any."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        waited = time.monotonic()
        with self._timer.phase("checkpoint"):
            info, write_seconds = pending.write.result()
        stalled_seconds = pending.capture_seconds + time.monotonic() - waited
        self._count(info, seconds=pending.capture_seconds + write_seconds, stalled_seconds=stalled_seconds)

    def _count(self, info: CheckpointInfo, *, seconds: float, stalled_seconds: float) -> None:
        self._end.measure_save(seconds)
        num_bytes = info.manifest.num_bytes
        self._metrics = {
            "save/step": float(info.step),
            "save/seconds": seconds,
            "save/stalled_seconds": stalled_seconds,
            "save/bytes": float(num_bytes),
            "save/bytes_per_second": num_bytes / seconds,
        }
        logger.info(
            "saved step %d: %.3g GB in %.1f s, %.3g GB/s; training stood still for %.1f s",
            info.step, num_bytes / 1e9, seconds, num_bytes / 1e9 / seconds, stalled_seconds,
        )  # fmt: skip
