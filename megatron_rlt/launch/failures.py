"""Classifies how ranks ended, finds the rank that caused a failure, and formats the report for the user.

When one rank dies, its peers fail a moment later with broken connections, so the culprit is the earliest failure of the
gravest kind. Ranks pass their records to the launcher as JSON files.
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
from typing import get_type_hints

import megatron_rlt
from megatron_rlt.given_files import lines_of, read_json_object
from megatron_rlt.launch.watchdog import Stall
from megatron_rlt.visible_text import one_line

PROGRAM = "megatron-rlt"
_REMOVE = "remove the file"
_PACKAGE = Path(megatron_rlt.__file__).parent

# gloo raises plain RuntimeErrors for broken connections; their messages contain one of these.
_CONNECTION_PHRASES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Kind(StrEnum):
    """Why a rank ended."""

    INPUT = "input"  # a ValueError raised by this project: a user error
    STOPPED = "stopped"  # a StoppedError: the job ended itself
    ERROR = "error"  # any other exception
    STALL = "stall"  # the watchdog fired
    SILENT = "silent"  # no sign of life, not even of the watchdog
    KILLED = "killed"  # by a signal from outside this launcher
    VANISHED = "vanished"  # a silent exit, or an abort, as by native code when a peer is gone
    CONNECTION = "connection"  # lost a peer


_GRAVITY = {Kind.VANISHED: 1, Kind.CONNECTION: 2}  # 0 for all others


@dataclass(frozen=True)
class Failure:
    """How one rank ended."""

    rank: int
    phase: str
    kind: Kind
    message: str  # what happened; several lines only for Kind.INPUT
    details: str  # traceback, empty where there is none
    seconds: float  # since the epoch
    num_beats: int = 0  # of a stalled rank's heartbeat

    @property
    def status(self) -> int:
        from megatron_rlt.types import BAD_INPUT, FAILED  # which imports torch; who only reads records needs none

        return BAD_INPUT if self.kind is Kind.INPUT else FAILED


def failure_of_exception(error: BaseException, *, rank: int, phase: str) -> Failure:
    """Classify the exception that a rank's job raised."""
    kind, details = _kind_of(error), "".join(traceback.format_exception(error))
    if kind in (Kind.INPUT, Kind.STOPPED):
        message = "\n".join(lines_of(error)) if isinstance(error, Exception) else str(error)
        return Failure(rank, phase, kind, message, details, time.time())
    message = one_line(traceback.format_exception_only(error)[-1].strip().splitlines()[0])
    return Failure(rank, phase, kind, message, details, time.time())


def failure_of_stall(stall: Stall, *, rank: int) -> Failure:
    """Failure of a rank whose watchdog fired."""
    return Failure(rank, stall.phase, Kind.STALL, stall.message, "", time.time(), stall.num_beats)


def failure_of_exit(exit_code: int, *, rank: int, phase: str, seconds: float) -> Failure:
    """Failure of a rank that left no record. As in `multiprocessing`, a negative `exit_code` is a signal number."""
    if exit_code >= 0:
        return Failure(rank, phase, Kind.VANISHED, f"exited with status {exit_code}, no reason given", "", seconds)
    name = signal.Signals(-exit_code).name
    kind = Kind.VANISHED if name == "SIGABRT" else Kind.KILLED
    hint = " (the system ran out of memory, or someone killed it)" if name == "SIGKILL" else ""
    return Failure(rank, phase, kind, f"killed by {name}{hint}", "", seconds)


def failure_of_silence(silent_seconds: float, *, rank: int, phase: str) -> Failure:
    """Failure of a rank that gave no sign of life for so long, and was ended."""
    message = (
        f"no sign of life for {silent_seconds:.1f} s: the process is stopped (SIGSTOP), or hangs in the system, as in a"
        " file system that does not answer"
    )
    return Failure(rank, phase, Kind.SILENT, message, "", time.time() - silent_seconds)


def culprit(failures: Sequence[Failure]) -> Failure:
    """The failure that caused the others: the gravest kind, then the earliest.

    Where ranks made no progress, one without a sign of life; of those that stalled, the one with the fewest beats: all
    run the same program, and the others wait for it.
    """
    first = min(failures, key=lambda failure: (_GRAVITY.get(failure.kind, 0), failure.seconds))
    silent = [failure for failure in failures if failure.kind is Kind.SILENT]
    if first.kind is Kind.STALL and silent:
        return min(silent, key=lambda failure: failure.seconds)
    if first.kind is not Kind.STALL:
        return first
    stalled = [failure for failure in failures if failure.kind is Kind.STALL]
    return min(stalled, key=lambda failure: (failure.num_beats, failure.seconds))


def report(failure: Failure, others: Sequence[Failure] = ()) -> str:
    """Report for the user: the culprit's traceback, then one line that names it.

    A user error or a StoppedError gives its message lines only, without traceback.
    """
    if failure.kind in (Kind.INPUT, Kind.STOPPED):
        return "".join(f"{PROGRAM}: error: {line}\n" for line in failure.message.splitlines())
    headline = f"rank {failure.rank} failed in phase {failure.phase}:"
    trace = f"{headline}\n{failure.details}" if failure.details else ""
    stalled = [other for other in others if other.kind is Kind.STALL]
    waiting = "".join(f"rank {other.rank} made no progress either, in phase {other.phase}\n" for other in stalled)
    return f"{trace}{waiting}{PROGRAM}: error: {headline} {failure.message}\n"


def write_failure(failure: Failure, folder: Path) -> None:
    """Write the record for the launcher, atomically."""
    partial = folder / f".failure-{failure.rank}.tmp"
    partial.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    partial.rename(folder / f"failure-{failure.rank}.json")


def read_failures(folder: Path) -> list[Failure]:
    """Read the records of all ranks. Raises ValueError for one that is damaged."""
    return [_read_failure(file) for file in sorted(folder.glob("failure-*.json"))]


def _read_failure(file: Path) -> Failure:
    record = read_json_object(file, remedy=_REMOVE)
    kinds = get_type_hints(Failure) | {"kind": str, "seconds": int | float}
    if not kinds.keys() - {"num_beats"} <= record.keys() <= kinds.keys() or record["kind"] not in list(Kind):
        raise ValueError(f"{file}: is no record of a failure; {_REMOVE}")
    if wrong := [name for name, value in record.items() if not isinstance(value, kinds[name])]:
        raise ValueError(f"{file}: holds no valid {wrong[0]!r}; {_REMOVE}")
    return Failure(**(record | {"kind": Kind(record["kind"])}))


def _kind_of(error: BaseException) -> Kind:
    if _is_users_fault(error):
        return Kind.INPUT
    import torch.distributed as dist

    from megatron_rlt.types import StoppedError

    if isinstance(error, StoppedError):
        return Kind.STOPPED
    broken = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _CONNECTION_PHRASES)
    return Kind.CONNECTION if broken or isinstance(error, dist.DistError | ConnectionError) else Kind.ERROR


def _is_users_fault(error: BaseException) -> bool:
    """Whether this project's code raised a ValueError; one raised inside a library is a bug and keeps its traceback."""
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
