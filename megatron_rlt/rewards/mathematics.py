r"""Whether two pieces of mathematics are equal, by math-verify in a process of its own.

In: two texts. Out: equal, different, or why that cannot be said. The process exists because a comparison may run for
ever or ask for all memory (`10^{10^{10}}`), and math-verify's own time-outs need the main thread and SIGALRM of the
process they run in. This one limits itself, so it dies by its own timer even if its rank is gone, and a new one takes
its place. Which text of a completion is its answer is left to `answers`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, get_args

from megatron_rlt.rewards.answers import joined_box
from megatron_rlt.rewards.denials import stated_part
from megatron_rlt.rewards.notation import common_notation, read_whole, statements
from megatron_rlt.rewards.units import latex_fraction

Outcome = Literal["equal", "different", "unreadable answer", "unreadable reference", "timed out", "crashed"]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing an answer with a reference."""

    outcome: Outcome
    answer: str | None  # the mathematics that was read from the answer's text; None if none was


class MathJudge:
    """Compares mathematics; owns one process, which starts with the first comparison and ends with `close`.

    Numbers count as equal up to 6 decimal places, below 0.1 up to 6 significant digits, expressions if sympy can show
    it. The time limit is processor time, so a busy machine changes no verdict; still, whether a comparison just below
    the limit ends is not exactly repeatable: in a distributed job let one rank judge a completion and tell the others.
    Not for several threads at once.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        """`timeout_seconds`: processor time for one comparison, > 0."""
        self._command = [sys.executable, "-m", "megatron_rlt.rewards.math_worker", str(timeout_seconds)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compare(self, answer: str, reference: str) -> Comparison:
        r"""Compare two texts, each with or without mathematics delimiters; never raises for what they say.

        The reference must be understood as a whole. Of an answer in prose, the part counts that math-verify finds.
        Units are compared where both have them; a number without one counts as having the other's.

        Raises:
            RuntimeError: math-verify cannot be started.
        """
        wanted = read_whole(next(statements(common_notation(reference))))
        if wanted is None:
            return Comparison("unreadable reference", None)
        plain = common_notation(answer)
        found = next(filter(None, map(read_whole, statements(plain))), None)
        if found is None and joined_box(plain) is None:
            after_marker, statement = statements(plain)
            prose = plain if after_marker == plain else statement
            stated = stated_part(prose)
            if stated is None:
                return Comparison("unreadable answer", None)
            if stated != prose:
                found, plain = read_whole(stated), stated
        latex = None if found is None else found.latex
        if found is not None and found.unit is not None and wanted.unit is not None:
            if found.unit.measured != wanted.unit.measured:
                return Comparison("different", answer)
            if found.unit.size != wanted.unit.size:
                latex = f"({latex})\\cdot{latex_fraction(found.unit.size / wanted.unit.size)}"
        boxed = plain if latex is None else f"\\boxed{{{latex}}}"
        reply = self._ask({"answer": boxed, "reference": f"\\boxed{{{wanted.latex}}}"})
        if isinstance(reply, str):
            judged = json.loads(reply)
            assert judged["outcome"] in get_args(Outcome), f"unknown outcome {judged['outcome']!r}"
            return Comparison(judged["outcome"], judged["answer"])
        if reply > 0:
            raise RuntimeError(f"math-verify ended with status {reply}; its traceback stands above, in standard error")
        return Comparison("timed out" if -reply == signal.SIGPROF else "crashed", None)

    def close(self) -> None:
        """End the process; the next comparison would start another."""
        if self._process is not None:
            self._end(self._process)

    def _ask(self, request: dict[str, str]) -> str | int:
        """The reply, or the status of the process that died instead (negative: the signal)."""
        if self._process is None:
            # A session of its own, because signals to the job's process group are for the ranks.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        return reply or self._end(process)

    def _end(self, process: subprocess.Popen[str]) -> int:
        """Close both pipes, which makes a process that still lives end by itself, and wait for it."""
        self._process = None
        process.communicate()
        return process.returncode
