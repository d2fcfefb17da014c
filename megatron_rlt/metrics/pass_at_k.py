"""avg@k, maj@k and pass@k of a benchmark, each with its standard error over problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Attempts:
    """Verdicts on one problem's completions, in sampling order."""

    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]  # None: no readable answer

    def __post_init__(self) -> None:
        assert len(self.correct) == len(self.answers), "one answer, or None, a completion"


@dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    mean: float
    standard_error: float  # sample standard deviation over problems / sqrt(problems); nan for one problem
    num_problems: int


def avg_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """Share of correct completions; every problem needs exactly k."""
    _check(problems, k, exactly=True)
    return _over_problems(problems, lambda attempts: sum(attempts.correct) / k)


def maj_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """Probability that the majority answer of k is correct; every problem needs exactly k.

    All correct answers count as one answer; wrong ones are distinguished by their text; completions without an answer
    do not vote. A tie counts as its expected value under a random choice, for example 1/2 if the correct answer and one
    other lead. No votes count as wrong.
    """
    _check(problems, k, exactly=True)
    return _over_problems(problems, _majority_is_right)


def pass_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """Probability that at least one of k is correct; every problem needs k or more completions.

    The unbiased estimate `1 - C(n - c, k) / C(n, k)` from n completions, c of them correct (Chen et al., arXiv
    2107.03374, equation 1), in integer arithmetic.
    """
    _check(problems, k, exactly=False)

    def passes(attempts: Attempts) -> float:
        num, right = len(attempts.correct), sum(attempts.correct)
        return 1 - math.comb(num - right, k) / math.comb(num, k)

    return _over_problems(problems, passes)


def _majority_is_right(attempts: Attempts) -> float:
    # The correct answer's key is None, which no wrong answer has.
    votes = Counter(
        None if correct else answer
        for correct, answer in zip(attempts.correct, attempts.answers, strict=True)
        if correct or answer is not None
    )
    most = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == most]
    return leaders.count(None) / len(leaders) if leaders else 0.0


def _over_problems(problems: Sequence[Attempts], value: Callable[[Attempts], float]) -> Estimate:
    values = [value(attempts) for attempts in problems]
    num = len(values)
    mean = math.fsum(values) / num
    if num == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((each - mean) ** 2 for each in values) / (num - 1)
    return Estimate(mean, math.sqrt(variance / num), num)


def _check(problems: Sequence[Attempts], k: int, *, exactly: bool) -> None:
    if not problems:
        raise ValueError("evaluation: there are no problems to average over; check the data set")
    for number, attempts in enumerate(problems, start=1):
        have = len(attempts.correct)
        if k < 1 or have < k or (exactly and have != k):
            rule = f"{'exactly' if exactly else 'at least'} k = {k} >= 1 completions"
            raise ValueError(f"evaluation: problem {number} has {have} completions and needs {rule}; sample again")
