"""Runs one malformed input in this process, and says what became of it: a refusal, a legal result, or a failure."""

from __future__ import annotations

import io
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from megatron_rlt.cli import guarded

MAX_SECONDS = 10.0
FORGED = "forged by a text"  # mutations put it behind a line break
_PREFIX = "megatron-rlt: error: "
_NOTICE = "megatron-rlt: a `verifier` section"
_CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


@dataclass(frozen=True)
class Attempt:
    """One input: `run` hands it to the program and returns the exit status, or None for 0."""

    what: str
    run: Callable[[], int | None]
    must_refuse: bool = False  # on the list of what can never be right
    must_accept: bool = False  # the untouched input: a group that refuses it tries nothing


@dataclass(frozen=True)
class Outcome:
    """`fault` says what is wrong with how the program answered; None: nothing."""

    kind: Literal["refused", "legal", "failed"]
    fault: str | None
    seconds: float


class _HangError(BaseException):
    """No Exception: nothing on the way may take it for a fault of the input."""


def outcome_of(attempt: Attempt) -> Outcome:
    """Run it. Only in the main thread: a timer ends what hangs."""
    output, errors = _stream("strict"), _stream("backslashreplace")
    start = time.monotonic()
    fault: str | None = None
    status = -1
    try:
        with redirect_stdout(output), redirect_stderr(errors), _time_limit():
            status = guarded(lambda: attempt.run() or 0)
    except _HangError:
        fault = f"hung over {MAX_SECONDS} s"
    except BaseException as error:
        fault = f"traceback: {type(error).__name__}: {str(error)[:300]}"
    seconds = time.monotonic() - start
    fault = fault or _fault(attempt, status, _text(output), _text(errors))
    if fault is not None:
        return Outcome("failed", fault, seconds)
    return Outcome("refused" if status == 2 else "legal", None, seconds)


def _fault(attempt: Attempt, status: int, output: str, errors: str) -> str | None:
    """What in an answer breaks the rules that stand in `docs/reliability.md`."""
    lines = errors.split("\n")[:-1]
    if status not in (0, 2):
        return f"status {status}: {errors[:300]}"
    if status == 2 and attempt.must_accept:
        return f"refused, and is sound: {errors[:300]}"
    if status == 0 and attempt.must_refuse:
        return "accepted, and cannot be right"
    if status == 2 and not any(line.startswith(_PREFIX) for line in lines):
        return "status 2 without a line that says why"
    for line in lines:
        if not line.startswith((_PREFIX, _NOTICE)):
            return f"a line on stderr that is no fault: {line[:300]!r}"
        if line.startswith(_PREFIX + FORGED) or line == _PREFIX:
            return f"a forged or empty line: {line!r}"
    for character in (output + errors).replace("\n", ""):
        if unicodedata.category(character) in _CONTROLS:
            return f"the control character {character!r} was printed: {(output + errors)[:300]!r}"
    return None


def _stream(errors: str) -> io.TextIOWrapper:
    """As the interpreter's own: stdout cannot write a lone surrogate."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    content = stream.buffer
    assert isinstance(content, io.BytesIO)
    return content.getvalue().decode()


@contextmanager
def _time_limit() -> Iterator[None]:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
