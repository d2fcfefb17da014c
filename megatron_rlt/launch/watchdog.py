"""Detects hanging ranks: jobs send a beat per phase and micro-batch, and a thread ends the process when beats stop.

It writes the stacks of all threads to the run folder first, and one line that names rank, phase and seconds.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_STDERR = 2  # file descriptor; sys.stderr may have none


@dataclass(frozen=True)
class Stall:
    """State of a rank when its watchdog fires."""

    phase: str
    detail: str
    seconds: float  # since the last beat
    num_beats: int  # the rank with the fewest beats hangs, and the others wait for it
    stacks: Path

    @property
    def message(self) -> str:
        doing = f" ({self.detail})" if self.detail else ""
        return f"no progress for {self.seconds:.1f} s{doing}; stacks of all threads in {self.stacks}"


class Heartbeat:
    """Watchdog of one rank, fed by `beat`. Create one per process; it watches while entered as a context."""

    def __init__(
        self,
        *,
        rank: int,
        folder: Path,
        timeout_seconds: float,
        on_phase: Callable[[str], None] | None = None,
        on_tick: Callable[[], None] = lambda: None,
        on_stall: Callable[[Stall], None] | None = None,
    ) -> None:
        """
        Args:
            folder: receives `stacks-rank-R.txt`.
            timeout_seconds: longest time between two beats.
            on_phase: called with the name of every new phase.
            on_tick: called in the watching thread at least four times per timeout: this process is not frozen.
            on_stall: called in the watching thread before it ends the process; None prints the line to stderr.
        """
        self._rank, self._timeout_seconds = rank, timeout_seconds
        self._on_phase, self._on_tick, self._on_stall = on_phase, on_tick, on_stall
        self._stacks = folder / f"stacks-rank-{rank}.txt"
        self._last = time.monotonic()
        self._phase, self._detail, self._num_beats = "start", "", 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def phase(self) -> str:
        """The phase of the last beat."""
        return self._phase

    def beat(self, phase: str, detail: str = "") -> None:
        """Report the current phase and work, for example `beat("update", "micro-batch 3 of 8")`."""
        if self._on_phase is not None and phase != self._phase:
            self._on_phase(phase)
        self._phase, self._detail = phase, detail
        self._num_beats += 1
        self._last = time.monotonic()

    def on_progress(self, detail: str) -> None:
        """Report the current work within the phase of the last beat."""
        self.beat(self._phase, detail)

    def __enter__(self) -> Heartbeat:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(self._timeout_seconds / 4, 1.0)
        self._on_tick()
        while not self._stop.wait(interval):
            self._on_tick()
            # If the main thread hangs while it holds the GIL, this thread never runs again; then faulthandler's own
            # thread, which does not need the GIL, writes the stacks to stderr and ends the process.
            faulthandler.dump_traceback_later(1.25 * self._timeout_seconds + 5, exit=True, file=_STDERR)
            seconds = time.monotonic() - self._last
            if seconds > self._timeout_seconds:
                self._end(seconds)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, seconds: float) -> None:
        stall = Stall(self._phase, self._detail, seconds, self._num_beats, self._stacks)
        line = f"rank {self._rank} failed in phase {stall.phase}: {stall.message}\n"
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("w", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self._on_stall is None:
            sys.stderr.write(line)
            sys.stderr.flush()
        else:
            self._on_stall(stall)
        os._exit(1)
