"""avg@k, maj@k and pass@k of a benchmark, each with its standard error over the problems.

In: the verdicts on several completions of each problem. Out: estimates. How completions were sampled and judged is
left to others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Attempts:
    """The verdicts on one problem's completions, in the order they were sampled."""

    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]  # what each answered; None: nothing that could be read

    def __post_init__(self) -> None:
        assert len(self.correct) == len(self.answers), "one answer, or None, a completion"


@dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    mean: float
    standard_error: float  # sample standard deviation over problems / sqrt(problems); nan for one problem
    num_problems: int


def avg_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """Share of right completions; every problem needs exactly k."""
    _check(problems, k, exactly=True)
    return _over_problems(problems, lambda attempts: sum(attempts.correct) / k)


def maj_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """How often the most frequent answer of k is right; every problem needs exactly k.

    Right answers are one answer, however they are written; wrong ones are told apart by their text, and completions
    without an answer do not vote. A tie is broken evenly at random, and what stands here is the expected value: 1/2
    if the right answer and one other lead together. Nobody voting is wrong.
    """
    _check(problems, k, exactly=True)
    return _over_problems(problems, _majority_is_right)


def pass_at_k(problems: Sequence[Attempts], *, k: int) -> Estimate:
    """Probability that at least one of k is right; every problem needs k or more completions.

    The unbiased estimate `1 - C(n - c, k) / C(n, k)` from n completions, c of them right (Chen et al., arXiv
    2107.03374, equation 1), in whole numbers.
    """
    _check(problems, k, exactly=False)

    def passes(attempts: Attempts) -> float:
        num, right = len(attempts.correct), sum(attempts.correct)
        return 1 - math.comb(num - right, k) / math.comb(num, k)

    return _over_problems(problems, passes)


def _majority_is_right(attempts: Attempts) -> float:
    # The right answer's key is None, which no wrong answer has.
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
