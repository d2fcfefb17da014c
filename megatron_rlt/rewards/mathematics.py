r"""Whether two pieces of mathematics are equal, by math-verify in a process of its own.

In: two texts. Out: equal, different, or why that cannot be said. The process exists because a comparison may run for
ever or ask for all memory (`10^{10^{10}}`), and math-verify's own time-outs need the main thread and SIGALRM of the
process they run in. This one limits itself, so it dies by its own timer even if its rank is gone, and a new one takes
its place. Which text of a completion is its answer is left to `answers`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, get_args

Outcome = Literal["equal", "different", "unreadable answer", "unreadable reference", "timed out", "crashed"]

_COMMANDS = re.compile(
    r"\\(?:text|textbf|textrm|mathrm|mbox|begin|end|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
    r"|\b(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|sqrt|pi|gcd|lcm|min|max|mod)\b"
)

_DELIMITER = re.compile(r"\\boxed|(?<!\\)\$|\\\(|\\\[")
_PROSE = re.compile(r"[A-Za-z]{2,}[.,:;]?\s|\s[A-Za-z]{2,}")


@dataclass(frozen=True)
class Comparison:
    """What came of comparing an answer with a reference."""

    outcome: Outcome
    answer: str | None  # the mathematics that was read from the answer's text; None if none was


class MathJudge:
    """Compares mathematics; owns one process, which starts with the first comparison and ends with `close`.

    Numbers count as equal up to 6 decimal places, expressions if sympy can show it. The time limit is processor time,
    so a busy machine changes no verdict; still, whether a comparison just below the limit ends is not exactly
    repeatable: in a distributed job let one rank judge a completion and tell the others. Not for several threads at
    once.
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
        """Compare two texts, each with or without mathematics delimiters; never raises for what they say.

        Raises:
            RuntimeError: math-verify cannot be started.
        """
        reply = self._ask({"answer": math_text(answer), "reference": math_text(reference)})
        if isinstance(reply, str):
            found = json.loads(reply)
            assert found["outcome"] in get_args(Outcome), f"unknown outcome {found['outcome']!r}"
            return Comparison(found["outcome"], found["answer"])
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


def math_text(text: str) -> str:
    r"""The text as math-verify should read it: bare mathematics is put into a \boxed{}, which tells it from prose.

    A text that has a \boxed{}, a dollar sign that is no currency (`\$`), \( or \[, or words beside each other, stays as
    it is, and its last expression counts. `\frac{1}{2}`, `sqrt(2)` and `x^2 - 1` are bare. They get a box and no dollar
    signs because math-verify then reads the whole of it or nothing: `$0.\overline{3}$` would be read as 0.
    """
    if _DELIMITER.search(text) or _PROSE.search(_COMMANDS.sub("0", text.strip())):
        return text
    return f"\\boxed{{{text.strip()}}}"
