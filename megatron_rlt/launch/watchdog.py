"""Finds ranks that hang: jobs say what they are doing, and a thread ends the process when nothing new is heard.

In: a beat at the start of every phase and micro-batch. Out, when beats stop: the stacks of all threads in the
run folder, one line that names rank, phase and seconds, and the end of the process. What the launcher makes of
that end is left to `launch.py`.
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

_STDERR = 2  # the file descriptor: sys.stderr may be something without one


@dataclass(frozen=True)
class Stall:
    """What is known about a rank when its watchdog fires."""

    phase: str
    detail: str
    seconds: float  # since the last beat
    num_beats: int  # of ranks that run the same program, the one with the fewest hangs and the others wait for it
    stacks: Path

    @property
    def message(self) -> str:
        doing = f" ({self.detail})" if self.detail else ""
        return f"no progress for {self.seconds:.1f} s{doing}; stacks of all threads in {self.stacks}"


class Heartbeat:
    """One rank's sign of life. Create one per process and hand it to whatever may take long."""

    def __init__(
        self,
        *,
        rank: int,
        folder: Path,
        timeout_seconds: float,
        on_phase: Callable[[str], None] | None = None,
        on_stall: Callable[[Stall], None] | None = None,
    ) -> None:
        """Nothing is watched before the heartbeat is entered as a context.

        Args:
            folder: where `stacks-rank-R.txt` is written.
            timeout_seconds: longest time between two beats.
            on_phase: called with the name of every new phase.
            on_stall: called in the watching thread before it ends the process; None prints the line to stderr.
        """
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._on_phase = on_phase
        self._on_stall = on_stall
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
        """Say that the rank is alive and what it does now, such as `beat("update", "micro-batch 3 of 8")`."""
        if self._on_phase is not None and phase != self._phase:
            self._on_phase(phase)
        self._phase, self._detail = phase, detail
        self._num_beats += 1
        self._last = time.monotonic()

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
        while not self._stop.wait(interval):
            # Should the main thread hang while it holds the interpreter's lock, this thread never runs again; then
            # faulthandler's own thread, which needs no lock, writes the stacks to stderr and ends the process.
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
