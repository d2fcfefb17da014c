"""Countdown problems drawn from a seed, each with a solution.

In: a seed and the size of the task. Out: problems that differ in numbers or target, so that parts of one list (for
training, for evaluation) never share a problem.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_rlt.rewards.countdown import CountdownTask
from megatron_rlt.types import Problem

# One draw in ten to a hundred is usable with ordinary settings; this many in vain means that hardly any exists.
MAX_DRAWS_PER_PROBLEM = 20_000


@dataclass(frozen=True)
class CountdownProblem:
    """A task and an expression that solves it with all its numbers."""

    task: CountdownTask
    expression: str

    @property
    def question(self) -> str:
        return self.task.question

    @property
    def solution(self) -> str:
        """The expression with its value: `(3 + 5) * 2 = 16`."""
        return f"{self.expression} = {self.task.target}"

    def row(self, problem_id: str) -> Problem:
        """The problem as a row of a data set, without a trace."""
        return Problem(problem_id, self.question, self.solution)


def draw_countdown(
    seed: int,
    count: int,
    *,
    num_numbers: int,
    largest_number: int,
    smallest_target: int,
    largest_target: int,
    use_all: bool,
) -> list[CountdownProblem]:
    """`count` different problems; the first ones do not depend on how many are drawn.

    Every step of a solution gives a positive whole number. The target is none of the numbers, which may repeat.
    Order does not make two problems different.

    Args:
        num_numbers: how many numbers each problem gives, at least 2.
        largest_number: numbers are drawn evenly from 1 to this one.
        smallest_target, largest_target: the target lies between them, both included.
        use_all: the task asks for every number exactly once, otherwise for each at most once.

    Raises:
        ValueError: there are hardly so many problems of this size.
    """
    rng = random.Random(seed)
    problems: dict[tuple[tuple[int, ...], int], CountdownProblem] = {}
    for _ in range(MAX_DRAWS_PER_PROBLEM * count):
        if len(problems) == count:
            break
        numbers = tuple(rng.randint(1, largest_number) for _ in range(num_numbers))
        target, expression = _combine(rng, numbers)
        if smallest_target <= target <= largest_target and target not in numbers:
            problem = CountdownProblem(CountdownTask(numbers, target, use_all), expression)
            problems.setdefault((tuple(sorted(numbers)), target), problem)
    if len(problems) < count:
        raise ValueError(
            f"countdown: only {len(problems)} of {count} different problems were found with {num_numbers} numbers up"
            f" to {largest_number} and targets from {smallest_target} to {largest_target}; ask for fewer or widen these"
        )
    return list(problems.values())


def _combine(rng: random.Random, numbers: tuple[int, ...]) -> tuple[int, str]:
    """A random expression of all numbers and its value; a step that would leave the positive whole numbers adds."""
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        (small, small_text), (large, large_text) = sorted(terms.pop(rng.randrange(len(terms))) for _ in range(2))
        sign = rng.choice("+-*/")
        if (sign == "-" and large == small) or (sign == "/" and large % small):
            sign = "+"
        value = {"+": large + small, "-": large - small, "*": large * small, "/": large // small}[sign]
        terms.append((value, f"({large_text} {sign} {small_text})"))
    value, text = terms[0]
    return value, text[1:-1]
