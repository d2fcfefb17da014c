"""Entry point of a rank that the launcher started: its output goes to files, its fate to the launcher's records."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rlt.launch.failures import Failure, Kind
from megatron_rlt.launch.rank import Config, Job, Listeners, exit_now, run_rank
from megatron_rlt.launch.records import Records
from megatron_rlt.parallel.environment import Place
from megatron_rlt.types import FAILED

# Ranks that wait for a hanging rank stop beating too, and any of them may notice first; all have reported after one or
# two seconds, and only then the one furthest behind is known.
_STALL_PATIENCE_SECONDS = 3.0
_INTERRUPTED = 128 + signal.SIGINT
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_HANDLED_BY_LAUNCHER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Output:
    """Files that receive what a rank writes; None: the launcher's own stream."""

    stdout: Path | None
    stderr: Path | None


def run_started_rank(
    job: Job[Config], config: Config, place: Place, records: Records, output: Output, launcher: int
) -> None:
    """Run the job and end the process with its status. The process is killed when its launcher ends, however it does.

    `launcher`: its process id.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(FAILED)
    _forget_the_launchers_handlers()
    _redirect(output)
    listeners = Listeners(
        partial(_end, records), partial(records.mark_phase, place.rank), partial(records.mark_alive, place.rank)
    )
    try:
        status = run_rank(job, config, place, listeners)
    except KeyboardInterrupt:
        exit_now(_INTERRUPTED)
    records.mark_done(place.rank)
    sys.exit(status)


def _end(records: Records, failure: Failure) -> None:
    records.write_failure(failure)
    if failure.kind is Kind.STALL:
        time.sleep(_STALL_PATIENCE_SECONDS)
    exit_now(failure.status)


def _forget_the_launchers_handlers() -> None:
    """A forked rank has the launcher's signal handlers, which would swallow what is forwarded to it."""
    for number in _HANDLED_BY_LAUNCHER:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _redirect(output: Output) -> None:
    for file, descriptor in ((output.stdout, 1), (output.stderr, 2)):
        if file is not None:
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(opened, descriptor)
            os.close(opened)
