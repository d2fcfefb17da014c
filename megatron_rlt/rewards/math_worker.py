"""The process in which math-verify runs: one JSON line in, one JSON line out, until its input ends.

Started by `mathematics.MathJudge` as a module, with the processor seconds for one comparison as its argument. The only
file that imports math-verify. A comparison that takes longer ends the process by SIGPROF, whose default action needs
no Python code to run; one that needs too much memory fails inside and counts as different or unreadable.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

# Parsing and comparing ordinary answers stays below 0.3 GiB; a tower of powers wants more than any machine has.
MEMORY_BYTES = 4 * 2**30
# Numbers below 10^-10000 are all equal: more digits would take minutes.
MAX_PLACES = 10_000
_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(timeout_seconds: float) -> None:
    """Answer requests `{"answer", "reference"}` by `{"outcome", "answer"}`."""
    for job_signal in _JOB_SIGNALS:  # they tell the ranks to save or to stop; the end of the input is our sign
        signal.signal(job_signal, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent that ignores it would have handed that down
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print, but not into the replies
    logging.disable(logging.WARNING)  # math-verify warns at length that no time-out of its own is set
    import math_verify  # here, after the signals are settled: the import takes a third of a second

    read = lru_cache(maxsize=1024)(_reader(math_verify))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout_seconds)
        reply = _compare(math_verify, read(request["answer"]), read(request["reference"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _reader(math_verify: Any) -> Any:  # noqa: ANN401 - an untyped package
    # Of a box all counts or nothing, and its units are gone: math-verify would take the t of 2t for one.
    defaults = math_verify.LatexExtractionConfig()
    whole = replace(
        defaults,
        try_extract_without_anchor=False,
        normalization_config=replace(defaults.normalization_config, units=False),
    )

    def read(text: str) -> tuple[list[Any], str | None]:
        """The boxed or else the last expression of a text, and how it is written there."""
        configs = (whole,) if text.startswith("\\boxed{") else (defaults, math_verify.ExprExtractionConfig())
        found = math_verify.parse(text, configs, parsing_timeout=None, fallback_mode="first_match")
        expressions = [_rounded(each) for each in found if not isinstance(each, str)]
        return expressions, next((each for each in found if isinstance(each, str)), None)

    return read


def _numbers(expression: Any) -> Iterator[Any]:  # noqa: ANN401
    """The largest parts that are numbers."""
    if getattr(expression, "is_number", False):
        yield expression
    else:
        for part in getattr(expression, "args", ()):
            yield from _numbers(part)


def _rounded(expression: Any) -> Any:  # noqa: ANN401
    """Decimal numbers, also such as 6.63 * 10^-34, as one number each, exact where they are whole."""
    import sympy

    def rounded(number: Any) -> Any:  # noqa: ANN401
        exact = number.xreplace({each: sympy.Rational(str(each)) for each in number.atoms(sympy.Float)}).doit()
        return exact if exact.is_Integer else exact.evalf(30)

    decimals = (each for each in _numbers(expression) if each.has(sympy.Float) and not each.has(sympy.UnevaluatedExpr))
    try:
        return expression.xreplace({each: rounded(each) for each in decimals})
    except Exception:  # noqa: BLE001 - sympy raises anything for odd expressions; they stay as they are
        return expression


def _first_digit(expression: Any) -> int:  # noqa: ANN401
    """Decimal place of the first digit of the smallest number: 1 for 0.2, 34 for 6.63e-34, 0 or less from 1 on."""
    import sympy

    try:
        values = [abs(each.doit().evalf()) for each in _numbers(expression)]
        places = [-math.floor(float(sympy.log(value, 10).evalf())) for value in values if value.is_Float and value > 0]
    except Exception:  # noqa: BLE001 - as above; they have the ordinary precision
        return 0
    return max(places, default=0)


def _before_percent(expression: Any) -> Any:  # noqa: ANN401
    """What an answer may say for a percentage: 12.5 for 12.5 %, but not 0.5 for 0.5 %, which could be meant as it is.

    None for anything else, and for whole numbers, of which math-verify knows it.
    """
    import sympy

    if not isinstance(expression, sympy.Mul):
        return None
    number, *signs = expression.args
    is_percentage = signs == [sympy.UnevaluatedExpr(sympy.Rational(1, 100))]
    return number if is_percentage and number.is_Number and not number.is_Integer and abs(number) >= 1 else None


def _compare(
    math_verify: Any,  # noqa: ANN401 - an untyped package
    answer: tuple[list[Any], str | None],
    reference: tuple[list[Any], str | None],
) -> dict[str, str | None]:
    if not reference[0]:
        return {"outcome": "unreadable reference", "answer": answer[1]}
    if not answer[0]:
        return {"outcome": "unreadable answer", "answer": answer[1]}
    place = min(_first_digit(reference[0][0]), MAX_PLACES)
    equal = any(
        math_verify.verify(
            wanted,
            answer[0],
            float_rounding=max(6, place + 5),
            numeric_precision=15 + max(0, place),
            allow_set_relation_comp=True,
            timeout_seconds=None,
        )
        for wanted in (reference[0], _before_percent(reference[0][0]))
        if wanted is not None
    )
    return {"outcome": "equal" if equal else "different", "answer": answer[1]}


if __name__ == "__main__":
    main(float(sys.argv[1]))
