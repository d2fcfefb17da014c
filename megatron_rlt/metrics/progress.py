"""Shows a run's progress to people: a live display on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5.0  # keeps the log of a fast run short


class Progress:
    """Progress of one run on one rank; use it as a context manager."""

    def __init__(
        self, *, title: str, piece: str, first_step: int, num_steps: int, console: Console | None, is_reporter: bool
    ) -> None:
        """
        Args:
            title: name of the run, such as "train".
            piece: what a step is called in its lines, "step" or "part".
            first_step: steps done before this process started; the time left ignores them.
            num_steps: steps of the whole run.
            console: draws a live display if it is a terminal; None draws none.
            is_reporter: whether this rank shows anything at all.
        """
        self._title, self._piece, self._num_steps, self._is_reporter = title, piece, num_steps, is_reporter
        self._first_step = self._done = first_step
        self._started = time.monotonic()
        self._last_line = -math.inf
        self._bar: Bar | None = None
        if is_reporter and console is not None and console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[phase]}"),
                TextColumn("{task.fields[values]}"),
                TextColumn("{task.fields[left]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                title, total=num_steps, completed=first_step, phase="starting", values="", left=""
            )

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show_phase(self, phase: str) -> None:
        """Show the current phase in a live display."""
        if self._bar is not None:
            self._bar.update(self._task, phase=phase)

    def finish_step(self, step: int, values: Mapping[str, float]) -> None:
        """Show that a step, counted from 1, is done, with these values in this order."""
        self._done = step
        if not self._is_reporter:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        left = f"{_duration(self._seconds_left())} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=shown, left=left)
        elif step == self._num_steps or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("%s: %s %d of %d: %s, %s", self._title, self._piece, step, self._num_steps, shown, left)

    def _seconds_left(self) -> float:
        per_step = (time.monotonic() - self._started) / max(self._done - self._first_step, 1)
        return per_step * (self._num_steps - self._done)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
