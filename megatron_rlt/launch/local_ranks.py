"""Supervises the ranks that the launcher started: forwards signals, records exits, kills survivors, finds the culprit.

Ranks report their phase, completion or failure in small files of a shared folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_rlt.launch.failures import PROGRAM, Failure, Kind, culprit, failure_of_exit, read_failures, report
from megatron_rlt.types import ENDED_EARLY

# Time for the peers of a dead rank to fail and report by themselves before they are killed. The elastic agent alone
# would wait 30 seconds for a rank inside a collective.
_GRACE_SECONDS = 3.0
_INTERVAL_SECONDS = 0.1
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def mark_phase(records: Path, rank: int, phase: str) -> None:
    """Record a rank's new phase, so that it is known even if the rank is killed."""
    (records / f"phase-{rank}").write_text(phase, encoding="utf-8")


def mark_done(records: Path, rank: int) -> None:
    """Record that a rank's job returned: its exit is no failure."""
    (records / f"done-{rank}").touch()


class LocalRanks:
    """Context manager that watches the processes started inside it, one per rank in order."""

    def __init__(self, world_size: int, records: Path) -> None:
        self._world_size, self._records = world_size, records
        self._received: list[int] = []
        self._processes: list[BaseProcess] = []
        self._died_at: dict[int, float] = {}  # rank -> seconds since the epoch
        self._ended_here: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="local-ranks", daemon=True)

    def __enter__(self) -> LocalRanks:
        # The agent installs handlers for the other signals and never removes them; all are restored at the end.
        self._handlers = {number: signal.getsignal(number) for number in (*_FORWARDED, signal.SIGINT, signal.SIGHUP)}
        for number in _FORWARDED:
            signal.signal(number, self._note)
        self._children_before = set(multiprocessing.active_children())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def explain_failure(self, error: ChildFailedError) -> int:
        """Print which rank failed first and how, once the processes are gone; returns the exit status."""
        self._stop_watching()
        failures = self._failures()
        if not failures:
            rank, agents_view = error.get_first_failure()
            failures = [failure_of_exit(agents_view.exitcode, rank=rank, phase="start", seconds=time.time())]
        first = culprit(failures)
        if self._ended_by_request(first):
            name = signal.Signals(self._received[0]).name
            sys.stderr.write(f"{PROGRAM}: ended by {name} before the first step; there was nothing to save\n")
            return ENDED_EARLY
        sys.stderr.write(report(first, [failure for failure in failures if failure is not first]))
        return first.status

    def _stop_watching(self) -> None:
        self._stop.set()
        self._thread.join()

    def _failures(self) -> list[Failure]:
        failures = {failure.rank: failure for failure in read_failures(self._records)}
        for rank in self._died_at.keys() - failures.keys() - self._ended_here:
            code = self._processes[rank].exitcode
            is_first = self._died_at[rank] == min(self._died_at.values())
            # The agent sends SIGTERM to all others when the first rank dies.
            if code and (code != -signal.SIGTERM or is_first):
                failures[rank] = failure_of_exit(code, rank=rank, phase=self._phase(rank), seconds=self._died_at[rank])
        return list(failures.values())

    def _phase(self, rank: int) -> str:
        file = self._records / f"phase-{rank}"
        return file.read_text(encoding="utf-8") if file.exists() else "start"

    def _ended_by_request(self, first: Failure) -> bool:
        """Whether a forwarded signal killed the ranks because their job did not handle it yet."""
        codes = {process.exitcode for process in self._processes}
        died_of_it = any(-number in codes for number in self._received)
        return died_of_it and first.kind in (Kind.KILLED, Kind.VANISHED, Kind.CONNECTION)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)

    def _watch(self) -> None:
        if not self._find_processes():
            return
        num_forwarded, deadline = 0, None
        while len(self._died_at) < self._world_size:
            alive = [rank for rank in range(self._world_size) if rank not in self._died_at]
            for number in self._received[num_forwarded:]:
                num_forwarded += 1
                self._send(number, alive)
            connection.wait([self._processes[rank].sentinel for rank in alive], timeout=_INTERVAL_SECONDS)
            for rank in alive:
                if connection.wait([self._processes[rank].sentinel], timeout=0):
                    self._died_at[rank] = time.time()
            if self._died_at and deadline is None and not self._all_done():
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                survivors = [rank for rank in alive if rank not in self._died_at]
                self._ended_here |= set(survivors)
                self._send(signal.SIGKILL, survivors)
                deadline += _GRACE_SECONDS

    def _find_processes(self) -> bool:
        """Wait until all ranks are started. Later only their sentinels are polled: polling a process object from two
        threads can lose its exit code."""
        while not self._stop.wait(_INTERVAL_SECONDS / 2):
            children = [p for p in multiprocessing.active_children() if p not in self._children_before]
            if len(children) == self._world_size:
                # Names end in a counter, which gives the order in which the agent started its ranks.
                self._processes = sorted(children, key=lambda process: int(process.name.rpartition("-")[2]))
                return True
        return False

    def _send(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            process_id = self._processes[rank].pid
            assert process_id is not None, "a process found among the active children has started"
            with suppress(ProcessLookupError):
                os.kill(process_id, number)

    def _all_done(self) -> bool:
        return len(list(self._records.glob("done-*"))) == self._world_size
