"""The launcher's view of the ranks it started: hands signals on, notes deaths, ends survivors, names the culprit.

The ranks leave small files in a folder that both sides know: their phase, that they are done, or why they
failed. Starting the processes is left to `launch.py`.
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

# What peers of a dead rank get to fail by themselves and say how, before they are killed. The elastic agent
# alone would wait 30 seconds for a rank that sits in a collective.
_GRACE_SECONDS = 3.0


_INTERVAL_SECONDS = 0.1


_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


def mark_phase(records: Path, rank: int, phase: str) -> None:
    """Called by a rank at every new phase, so that the phase is known even if it is killed."""
    (records / f"phase-{rank}").write_text(phase, encoding="utf-8")


def mark_done(records: Path, rank: int) -> None:
    """Called by a rank whose job returned: its exit from now on is no failure."""
    (records / f"done-{rank}").touch()


class LocalRanks:
    """Watches the processes that are started while this is entered as a context, one for each rank in order."""

    def __init__(self, world_size: int, records: Path) -> None:
        self._world_size = world_size
        self._records = records
        self._received: list[int] = []
        self._processes: list[BaseProcess] = []
        self._died_at: dict[int, float] = {}  # rank -> seconds since the epoch
        self._ended_here: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="local-ranks", daemon=True)

    def __enter__(self) -> LocalRanks:
        # The agent installs handlers for the other signals and leaves them; all are put back at the end.
        self._handlers = {number: signal.getsignal(number) for number in (*_FORWARDED, signal.SIGINT, signal.SIGHUP)}
        for number in _FORWARDED:
            signal.signal(number, self._note)
        self._children_before = set(multiprocessing.active_children())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def explain_failure(self, error: ChildFailedError) -> int:
        """Once the processes are gone: print who failed first and how, and return the exit status."""
        self._stop.set()
        self._thread.join()
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

    def _failures(self) -> list[Failure]:
        failures = {failure.rank: failure for failure in read_failures(self._records)}
        for rank in self._died_at.keys() - failures.keys() - self._ended_here:
            code = self._processes[rank].exitcode
            is_first = self._died_at[rank] == min(self._died_at.values())
            # The agent answers the first death with SIGTERM to all others.
            if code and (code != -signal.SIGTERM or is_first):
                failures[rank] = failure_of_exit(code, rank=rank, phase=self._phase(rank), seconds=self._died_at[rank])
        return list(failures.values())

    def _phase(self, rank: int) -> str:
        file = self._records / f"phase-{rank}"
        return file.read_text(encoding="utf-8") if file.exists() else "start"

    def _ended_by_request(self, first: Failure) -> bool:
        """Whether the ranks died of a signal handed on to them: their job did not listen for it yet."""
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
        """Wait until all ranks are started. From then on only their sentinels are asked: asking a process
        object for its state from two threads can lose its exit code."""
        while not self._stop.wait(_INTERVAL_SECONDS / 2):
            children = [p for p in multiprocessing.active_children() if p not in self._children_before]
            if len(children) == self._world_size:
                # Names end in a counter, so that this is the order in which the agent started its ranks.
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
