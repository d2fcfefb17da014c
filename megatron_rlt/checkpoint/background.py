"""Writes a captured checkpoint in a thread of every rank while training goes on.

A thread, not a process: it ends with its rank, so that no writer outlives a killed job and meets the next start in the
run folder; nothing is copied to another process, or forked beside CUDA; and what takes long, writing and hashing, holds
no lock of Python's.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.checkpoint.folders import CheckpointInfo
from megatron_rlt.checkpoint.saving import CapturedState, write_training_state


class BackgroundWrite:
    """A checkpoint that is being written. Start it on every rank; one at a time."""

    def __init__(self, captured: CapturedState, folder: Path, *, keep_last: int, group: dist.ProcessGroup) -> None:
        """
        Args:
            captured: copies, which training does not change.
            group: all ranks, for this thread alone.
        """
        self.step = captured.step
        self._outcome: Future[CheckpointInfo] = Future()
        self._started = time.monotonic()
        self._seconds = 0.0
        arguments = (captured, folder, keep_last, group)
        threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether this rank's thread has; others may still write."""
        return self._outcome.done()

    def error(self) -> BaseException | None:
        """Wait for the end; what failed, if anything."""
        return self._outcome.exception()

    def result(self) -> tuple[CheckpointInfo, float]:
        """Wait for the end; the checkpoint, and the seconds that the writing took.

        Raises on every rank what `write_training_state` raised.
        """
        return self._outcome.result(), self._seconds

    def _write(self, captured: CapturedState, folder: Path, keep_last: int, group: dist.ProcessGroup) -> None:
        try:
            info = write_training_state(captured, folder, keep_last=keep_last, group=group)
        except BaseException as error:  # noqa: BLE001 - raised where the outcome is asked for
            self._outcome.set_exception(error)
        else:
            self._seconds = time.monotonic() - self._started
            self._outcome.set_result(info)
