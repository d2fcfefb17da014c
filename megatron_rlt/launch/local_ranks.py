"""Starts the ranks of a command on this machine, watches them, forwards signals and says which rank failed first.

The ranks meet through a file of a private folder and talk over the loopback interface: nothing else listens. In that
folder they also record their phase, signs of life, completion and failures.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_rlt.launch.failures import PROGRAM, Failure, Kind, culprit, failure_of_exit, failure_of_silence, report
from megatron_rlt.launch.rank import Config, Job, exit_now
from megatron_rlt.launch.rank_logs import RankLogs
from megatron_rlt.launch.records import Records
from megatron_rlt.launch.signals import ReceivedSignals
from megatron_rlt.launch.silence import Silence
from megatron_rlt.launch.started_rank import Output, run_started_rank
from megatron_rlt.parallel.environment import Place, share_cores
from megatron_rlt.types import ENDED_EARLY

_START_METHOD = "spawn"  # a forked rank would inherit torch's threads and locks
# Time for the peers of a dead rank to fail and report by themselves before they are killed.
_GRACE_SECONDS = 3.0
_END_SECONDS = 5.0  # between a signal that ends the command and SIGKILL
_UNKILLABLE_SECONDS = 10.0  # a process that outlives SIGKILL so long waits for a device or a file system
_INTERVAL_SECONDS = 0.1


def run_local_ranks(job: Job[Config], config: Config, world_size: int) -> int:
    """Run the job on ranks of their own processes; returns the exit status of the whole.

    `job` is a module-level function, which started processes import by name.
    """
    share_cores(world_size)
    start = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs = RankLogs(config.output_dir / "logs" / start, world_size)
    # Python makes the folder with mode 0700: who cannot open it cannot join the ranks.
    with TemporaryDirectory(prefix="megatron-rlt-") as folder, ReceivedSignals() as signals:
        records = Records(Path(folder))
        processes = _start(job, config, records, logs.outputs)
        ranks = LocalRanks(processes, records, signals, logs, timeout_seconds=config.watchdog.timeout_seconds)
        status = ranks.wait()
    if ranks.alive():
        exit_now(status)  # else Python would wait for a process that no signal ends
    return status


def _start(job: Job[Config], config: Config, records: Records, outputs: Sequence[Output]) -> list[BaseProcess]:
    context: Any = multiprocessing.get_context(_START_METHOD)
    processes: list[BaseProcess] = []
    try:
        for rank, output in enumerate(outputs):
            place = Place(rank, len(outputs), rank, "this command", records.meeting_file)
            arguments = (job, config, place, records, output, os.getpid())
            processes.append(context.Process(target=run_started_rank, args=arguments))
            processes[-1].start()
    except BaseException:
        for process in processes[:-1]:  # they would wait for the one that did not start
            process.kill()
        raise
    return processes


class LocalRanks:
    """The processes of all ranks, in order."""

    def __init__(
        self,
        processes: Sequence[BaseProcess],
        records: Records,
        signals: ReceivedSignals,
        logs: RankLogs,
        *,
        timeout_seconds: float,
    ) -> None:
        """`timeout_seconds`: of the ranks' watchdogs."""
        self._processes, self._records, self._signals, self._logs = processes, records, signals, logs
        self._silence = Silence(records, len(processes), timeout_seconds)
        self._num_forwarded = 0
        self._died_at: dict[int, float] = {}  # rank -> seconds since the epoch
        self._killed: set[int] = set()  # by this launcher

    def alive(self) -> list[int]:
        """Ranks whose process runs."""
        return [rank for rank in range(len(self._processes)) if rank not in self._died_at]

    def wait(self) -> int:
        """Wait for the end of all ranks, or end them; prints which rank failed first and how. Returns the status."""
        deadline: float | None = None
        while self.alive():
            self._look()
            if self._signals.ending is not None:
                return self._end(self._signals.ending)
            if deadline is None and (self._has_failed() or self._silence.is_too_long(self.alive())):
                deadline = time.monotonic() + (_GRACE_SECONDS if self._died_at else 0.0)
            if deadline is not None and time.monotonic() >= deadline:
                self._kill()
                break
        self._logs.show(to_the_end=True)
        failures = self._failures()
        return self._explain(failures) if failures else max(self._exit_code(rank) for rank in self._died_at)

    def _look(self) -> None:
        """Wait a moment for a death; forward signals, and show what the ranks wrote."""
        received = self._signals.forwarded
        while self._num_forwarded < len(received):
            self._send(received[self._num_forwarded], self.alive())
            self._num_forwarded += 1
        sentinels = {self._processes[rank].sentinel: rank for rank in self.alive()}
        for sentinel in connection.wait(list(sentinels), timeout=_INTERVAL_SECONDS):
            assert isinstance(sentinel, int), "the sentinel of a process is a number"
            self._processes[sentinels[sentinel]].join()  # its files close a moment before it has an exit code
            self._died_at[sentinels[sentinel]] = time.time()
        self._silence.listen(self.alive())
        self._logs.show()

    def _has_failed(self) -> bool:
        """Whether a rank died before its job returned."""
        return any(not self._records.is_done(rank) for rank in self._died_at)

    def _end(self, number: int) -> int:
        """End the ranks as a signal asks that ends the command."""
        self._send(number, self.alive())
        deadline = time.monotonic() + _END_SECONDS
        while self.alive() and time.monotonic() < deadline:
            self._look()
        self._kill()
        self._logs.show(to_the_end=True)
        return 128 + number

    def _kill(self) -> None:
        survivors = self.alive()
        self._killed |= set(survivors)
        self._send(signal.SIGKILL, survivors)
        deadline = time.monotonic() + _UNKILLABLE_SECONDS
        while self.alive() and time.monotonic() < deadline:
            self._look()

    def _send(self, number: int, ranks: Iterable[int]) -> None:
        for rank in ranks:
            process_id = self._processes[rank].pid
            assert process_id is not None, "all processes have started"
            with suppress(ProcessLookupError):
                os.kill(process_id, number)

    def _exit_code(self, rank: int) -> int:
        code = self._processes[rank].exitcode
        assert code is not None, "the process has ended"
        return code

    def _failures(self) -> list[Failure]:
        failures = self._records.failures()
        for rank in self._died_at.keys() - failures.keys() - self._killed:
            code, phase = self._exit_code(rank), self._records.phase(rank)
            if not self._records.is_done(rank) or code < 0:
                failures[rank] = failure_of_exit(code, rank=rank, phase=phase, seconds=self._died_at[rank])
        quiet = {rank for rank in self._silence.quiet_ranks() if not self._records.is_done(rank)}
        for rank in quiet - {one.rank for one in failures.values() if one.kind is not Kind.VANISHED}:
            phase, seconds = self._records.phase(rank), self._silence.seconds(rank)
            failures[rank] = failure_of_silence(seconds, rank=rank, phase=phase)
        return list(failures.values())

    def _explain(self, failures: Sequence[Failure]) -> int:
        first = culprit(failures)
        if self._ended_by_request(first):
            name = signal.Signals(self._signals.forwarded[0]).name
            sys.stderr.write(f"{PROGRAM}: ended by {name} before the first step; there was nothing to save\n")
            return ENDED_EARLY
        sys.stderr.write(report(first, [failure for failure in failures if failure is not first]))
        return first.status

    def _ended_by_request(self, first: Failure) -> bool:
        """Whether a forwarded signal killed the ranks because their job did not handle it yet."""
        codes = {self._exit_code(rank) for rank in self._died_at}
        died_of_it = any(-number in codes for number in self._signals.forwarded)
        return died_of_it and first.kind in (Kind.KILLED, Kind.VANISHED, Kind.CONNECTION)
