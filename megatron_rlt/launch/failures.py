"""How ranks ended, which of them failed first by itself, and the lines a user reads about it.

When one rank dies, its peers fail a moment later with broken connections. So a failure has a kind, and the
culprit is the earliest of the gravest kind. Records travel as JSON files in a folder of the launcher.
"""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import torch.distributed as dist

import megatron_rlt
from megatron_rlt.launch.watchdog import Stall
from megatron_rlt.types import BAD_INPUT, FAILED, StoppedError

PROGRAM = "megatron-rlt"


_PACKAGE = Path(megatron_rlt.__file__).parent


# gloo's broken connections are plain RuntimeErrors; these are what they say.
_CONNECTION_PHRASES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Kind(StrEnum):
    """Why a rank ended."""

    INPUT = "input"  # a ValueError of this project: the user's fault
    STOPPED = "stopped"  # a StoppedError: the job itself decided to end
    ERROR = "error"  # any other exception
    STALL = "stall"  # the watchdog fired
    KILLED = "killed"  # by a signal that this launcher did not send
    VANISHED = "vanished"  # an exit without a word, or an abort: also what native code does when a peer is gone
    CONNECTION = "connection"  # a peer was gone


_GRAVITY = {Kind.VANISHED: 1, Kind.CONNECTION: 2}  # 0 for all others


@dataclass(frozen=True)
class Failure:
    """One rank's end."""

    rank: int
    phase: str
    kind: Kind
    message: str  # what happened; several lines only for Kind.INPUT
    details: str  # traceback, empty where there is none
    seconds: float  # since the epoch
    num_beats: int = 0  # of a stalled rank

    @property
    def status(self) -> int:
        return BAD_INPUT if self.kind is Kind.INPUT else FAILED


def failure_of_exception(error: BaseException, *, rank: int, phase: str) -> Failure:
    """Classify what a rank's job raised."""
    return Failure(
        rank=rank,
        phase=phase,
        kind=_kind_of(error),
        message=str(error)
        if _is_users_fault(error) or isinstance(error, StoppedError)
        else traceback.format_exception_only(error)[-1].strip().splitlines()[0],
        details="".join(traceback.format_exception(error)),
        seconds=time.time(),
    )


def failure_of_stall(stall: Stall, *, rank: int) -> Failure:
    """Of a rank whose watchdog fired."""
    return Failure(rank, stall.phase, Kind.STALL, stall.message, "", time.time(), stall.num_beats)


def failure_of_exit(exit_code: int, *, rank: int, phase: str, seconds: float) -> Failure:
    """Of a rank that left no record. `exit_code` is negative for a signal, as Python's process objects have it."""
    if exit_code >= 0:
        return Failure(rank, phase, Kind.VANISHED, f"exited with status {exit_code}, no reason given", "", seconds)
    name = signal.Signals(-exit_code).name
    kind = Kind.VANISHED if name == "SIGABRT" else Kind.KILLED
    hint = " (the system ran out of memory, or someone killed it)" if name == "SIGKILL" else ""
    return Failure(rank, phase, kind, f"killed by {name}{hint}", "", seconds)


def culprit(failures: Sequence[Failure]) -> Failure:
    """The failure that caused the others: the gravest kind, then the earliest.

    Of stalled ranks it is the one with the fewest beats: all ranks run the same program, and the others wait
    for the one that is furthest behind.
    """
    first = min(failures, key=lambda failure: (_GRAVITY.get(failure.kind, 0), failure.seconds))
    if first.kind is not Kind.STALL:
        return first
    stalled = [failure for failure in failures if failure.kind is Kind.STALL]
    return min(stalled, key=lambda failure: (failure.num_beats, failure.seconds))


def report(failure: Failure, others: Sequence[Failure] = ()) -> str:
    """What a user reads: the culprit's traceback first, then one line that names it.

    A user's fault is one line for each fault and no traceback, a job's own end one line.
    """
    if failure.kind in (Kind.INPUT, Kind.STOPPED):
        return "".join(f"{PROGRAM}: error: {line}\n" for line in failure.message.splitlines())
    headline = f"rank {failure.rank} failed in phase {failure.phase}:"
    trace = f"{headline}\n{failure.details}" if failure.details else ""
    stalled = [other for other in others if other.kind is Kind.STALL]
    waiting = "".join(f"rank {other.rank} made no progress either, in phase {other.phase}\n" for other in stalled)
    return f"{trace}{waiting}{PROGRAM}: error: {headline} {failure.message}\n"


def write_failure(failure: Failure, folder: Path) -> None:
    """Leave the record for the launcher; it appears at once as a whole."""
    partial = folder / f".failure-{failure.rank}.tmp"
    partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    partial.rename(folder / f"failure-{failure.rank}.json")


def read_failures(folder: Path) -> list[Failure]:
    """All records the ranks left."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("failure-*.json"))]
    return [Failure(**(record | {"kind": Kind(record["kind"])})) for record in records]


def _kind_of(error: BaseException) -> Kind:
    if _is_users_fault(error):
        return Kind.INPUT
    if isinstance(error, StoppedError):
        return Kind.STOPPED
    broken = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _CONNECTION_PHRASES)
    return Kind.CONNECTION if broken or isinstance(error, dist.DistError | ConnectionError) else Kind.ERROR


def _is_users_fault(error: BaseException) -> bool:
    """A ValueError raised by this project's own code; one raised inside a library is a defect and keeps its trace."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
