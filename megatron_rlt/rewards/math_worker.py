"""The process in which math-verify runs: one JSON line in, one JSON line out, until its input ends.

Started by `mathematics.MathJudge` as a module, with the processor seconds for one comparison as its argument. The only
file that imports math-verify. A comparison that takes longer ends the process by SIGPROF, whose default action needs
no Python code to run; one that needs too much memory fails inside and counts as different or unreadable.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

# Parsing and comparing ordinary answers stays below 0.3 GiB; a tower of powers wants more than any machine has.
MEMORY_BYTES = 4 * 2**30
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
    def read(text: str) -> tuple[list[Any], str | None]:
        """The last expression of a text, and how it is written there."""
        found = math_verify.parse(text, parsing_timeout=None, fallback_mode="first_match")
        expressions = [each for each in found if not isinstance(each, str)]
        return expressions, next((each for each in found if isinstance(each, str)), None)

    return read


def _compare(
    math_verify: Any,  # noqa: ANN401 - an untyped package
    answer: tuple[list[Any], str | None],
    reference: tuple[list[Any], str | None],
) -> dict[str, str | None]:
    if not reference[0]:
        return {"outcome": "unreadable reference", "answer": answer[1]}
    if not answer[0]:
        return {"outcome": "unreadable answer", "answer": answer[1]}
    equal = math_verify.verify(reference[0], answer[0], timeout_seconds=None)
    return {"outcome": "equal" if equal else "different", "answer": answer[1]}


if __name__ == "__main__":
    main(float(sys.argv[1]))
