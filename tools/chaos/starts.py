"""One start of a case's command: a whole command as users start it, or one that is forked with all imports done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

from tools.chaos.cases import Case
from tools.chaos.kills import LABELS, Moment, arm
from tools.chaos.sockets import ListeningSocket, sockets_while_it_runs
from tools.preloaded import ROOT, PreloadedCommand, forkserver

Kind = Literal["whole", "forked"]
_TIMEOUT_SECONDS = 1800.0  # 4 seconds on two idle cores; they may be anything but idle
_POLL_SECONDS = 0.002
_ERROR = "megatron-rlt: error: "
_numbers = count()


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    status: int
    printed: str
    counts: dict[str, int]  # operations on files by label; of forked starts

    @property
    def was_killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.printed.splitlines() if line.startswith(_ERROR)]

    @property
    def has_traceback(self) -> bool:
        return "Traceback" in self.printed


class Start:
    """A running command on a case's root; its log lies beside the root."""

    def __init__(self, case: Case, root: Path, kind: Kind, moment: Moment | None = None) -> None:
        """`moment`: of a kill, for forked starts alone."""
        self._lock = root / case.lock
        self._log = root.with_name(f"{root.name}-{next(_numbers)}.log")
        self._counts: Any = forkserver().Array("q", len(LABELS)) if kind == "forked" else None
        arguments = case.arguments(root)
        self._process: _Process
        if kind == "whole":
            self._process = _whole(arguments, self._log)
        else:
            before = partial(arm, root, moment or Moment("any", 0), self._counts)
            self._process = PreloadedCommand(arguments, output=self._log, errors=self._log, before=before)

    def after_lock(self, seconds: float) -> bool:
        """Wait until the command holds its lock, and then so long; whether it runs still."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not self._lock.exists() and self._process.poll() is None:
            assert time.monotonic() < deadline, "the lock never came"
            time.sleep(_POLL_SECONDS)
        time.sleep(seconds)
        return self._process.poll() is None

    def has_lock(self) -> bool:
        """Whether it still writes."""
        return self._lock.exists()

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def listening(self) -> set[ListeningSocket]:
        """All sockets on which it listens until it ends."""
        return sockets_while_it_runs(self._process.pid, lambda: self._process.poll() is None)

    def finish(self) -> Ended:
        """Wait for its end; a command that hangs is killed, and that is a failure."""
        try:
            status = self._process.wait(_TIMEOUT_SECONDS)
        except (AssertionError, subprocess.TimeoutExpired):
            self.tell(signal.SIGKILL)
            self._process.wait(_TIMEOUT_SECONDS)
            status = -signal.SIGALRM
        self.tell(signal.SIGKILL)  # ranks that outlived a killed launcher
        counts = dict(zip(LABELS, self._counts, strict=True)) if self._counts is not None else {}
        printed = self._log.read_text(errors="replace")
        self._log.unlink()
        return Ended(status, printed, counts)


def _whole(arguments: list[str], log: Path) -> _Process:
    with log.open("wb") as file:
        process: _Process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rlt", *arguments],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )
    return process
