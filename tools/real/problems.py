"""Word problems of two to four steps, with careful, sloppy and leaping traces: `python -m tools.real.problems OUT`.

`OUT/train.jsonl` has id, question, solution and reasoning_trace, `OUT/held_out.jsonl` other questions without a trace.
Names, things, order of sentences and the words of every step vary, so that no template can be learnt by heart. Seeded:
the same arguments give the same bytes. Nothing here knows the trainer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_NAMES = ("Ada", "Ben", "Chen", "Dina", "Emil", "Fatou", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Mara", "Noor")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")
_PLACES = (
    "at the market",
    "on Monday",
    "after lunch",
    "at school",
    "in the morning",
    "from the shelf",
    "that week",
    "",
)
_GAINS = ("buys {n} more {things}", "finds {n} {things}", "is given {n} {things}", "gets another {n} {things}")
_LOSSES = ("gives away {n} {things}", "loses {n} of the {things}", "sells {n} {things}", "uses up {n} {things}")
_TIMES = ("ends up with {n} times as many {things}", "swaps each of the {things} for {n} new ones")
_SPLITS = ("shares all {things} fairly among {n} boxes and keeps one box", "keeps only one of every {n} {things}")
_ASKED = (
    "How many {things} does {name} have now?",
    "How many {things} are left for {name}?",
    "Find the number of {things} that {name} has in the end.",
)
_OPENERS = ("Let me work through it.", "We go step by step.", "Start with what is known.", "First things first.", "")
_STEPS = (
    "{before} {sign} {n} = {after}.",
    "Now {before} {sign} {n} gives {after}.",
    "That makes {before} {sign} {n}, which is {after}.",
    "After this there are {after}, because {before} {sign} {n} = {after}.",
    "Next, {before} {sign} {n} makes {after}.",
)
_CLOSERS = (
    "So the answer is {answer}.",
    "In the end there are {answer}.",
    "Hence {answer}.",
    "The result is {answer}.",
)
_LEAPS = ("It is easy to see that it is {answer}.", "This is simply {answer}.", "One finds {answer} at once.")
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+)(?: = | gives |, which is | makes )(\d+)")
_BOXED = re.compile(r"\\boxed\{(\d+)\}")
_SHARES = {"careful": 0.4, "sloppy": 0.3, "leap": 0.3}


class Style(StrEnum):
    """How a trace explains."""

    CAREFUL = "careful"  # every step, every step right
    SLOPPY = "sloppy"  # one intermediate result is wrong, the stated answer is right all the same
    LEAP = "leap"  # states the answer without steps


@dataclass(frozen=True)
class Step:
    """One operation on the number at hand."""

    sign: str  # + - * /
    n: int
    before: int
    after: int
    words: str


@dataclass(frozen=True)
class WordProblem:
    """A question with its steps."""

    question: str
    start: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].after

    def solution(self, rng: random.Random) -> str:
        """The finished solution: one line, then the boxed answer."""
        line = rng.choice(_CLOSERS).format(answer=self.answer)
        return f"{line} \\boxed{{{self.answer}}}"


def draw_problem(rng: random.Random) -> WordProblem:
    """A problem whose numbers stay whole and between 1 and 999."""
    name, things, start = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(3, 40)
    steps: list[Step] = []
    number = start
    for _ in range(rng.randint(2, 4)):
        steps.append(_draw_step(rng, number, things))
        number = steps[-1].after
    told = " ".join(_sentence(rng, name, step.words) for step in steps)
    question = f"{name} has {start} {things}. {told} {rng.choice(_ASKED).format(name=name, things=things)}"
    return WordProblem(question, start, tuple(steps))


def _draw_step(rng: random.Random, number: int, things: str) -> Step:
    divisors = [n for n in range(2, 7) if number % n == 0 and number > n]
    signs = ["+"] + ["-"] * (number > 2) + ["*"] * (number < 150) + ["/"] * bool(divisors)
    sign = rng.choice(signs)
    ways: tuple[str, ...]
    if sign == "+":
        n, ways = rng.randint(2, 60), _GAINS
    elif sign == "-":
        n, ways = rng.randint(1, number - 1), _LOSSES
    elif sign == "*":
        n, ways = rng.randint(2, 5), _TIMES
    else:
        n, ways = rng.choice(divisors), _SPLITS
    after = {"+": number + n, "-": number - n, "*": number * n, "/": number // n}[sign]
    return Step(sign, n, number, after, rng.choice(ways).format(n=n, things=things))


def _sentence(rng: random.Random, name: str, words: str) -> str:
    place, subject = rng.choice(_PLACES), rng.choice((name, "Then " + name, "Later " + name, "After that " + name))
    return f"{subject} {words}{' ' + place if place else ''}."


def draw_style(rng: random.Random) -> Style:
    """Mostly not careful: RL has something to find."""
    return Style(rng.choices(list(_SHARES), list(_SHARES.values()))[0])


def trace(rng: random.Random, problem: WordProblem, style: Style) -> str:
    """An explanation of a problem in that style."""
    if style is Style.LEAP:
        return rng.choice(_LEAPS).format(answer=problem.answer)
    wrong = rng.randrange(len(problem.steps)) if style is Style.SLOPPY else None
    parts = [rng.choice(_OPENERS)]
    for index, step in enumerate(problem.steps):
        after = step.after + rng.choice((-2, -1, 1, 2, 10)) if index == wrong else step.after
        parts.append(rng.choice(_STEPS).format(before=step.before, sign=step.sign, n=step.n, after=after))
    parts.append(rng.choice(_CLOSERS).format(answer=problem.answer))
    return " ".join(filter(None, parts))


def style_of(question: str, answer: str, text: str) -> Style:
    """What a written explanation turns out to be.

    Careful: its equations use the question's numbers in their order, each from the result before it, all of them right,
    and end at the answer.
    """
    written = [(int(before), sign, int(n), int(after)) for before, sign, n, after in _EQUATION.findall(text)]
    if not written:
        return Style.LEAP
    start, *operands = (int(digits) for digits in re.findall(r"\d+", question))
    results = [after for *_, after in written]
    chained = [before for before, *_ in written] == [start, *results[:-1]]
    right = all(_holds(*equation) for equation in written)
    is_careful = chained and right and [n for _, _, n, _ in written] == operands and str(results[-1]) == answer
    return Style.CAREFUL if is_careful else Style.SLOPPY


def _holds(before: int, sign: str, n: int, after: int) -> bool:
    if sign == "/":
        return n != 0 and before == after * n
    return {"+": before + n, "-": before - n, "*": before * n}[sign] == after


def answer_of(solution: str) -> str:
    """The boxed answer of a solution written here."""
    found = _BOXED.search(solution)
    assert found is not None, f"no boxed answer in {solution!r}"
    return found.group(1)


def write_rows(out: Path, *, seed: int, num_rows: int, num_held_out: int) -> None:
    """Write both files; no question is in both."""
    rng, seen = random.Random(seed), set()

    def distinct() -> Iterator[WordProblem]:
        while True:
            problem = draw_problem(rng)
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    problems = distinct()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            one = next(problems)
            traced = {"reasoning_trace": trace(rng, one, draw_style(rng))}
            row = {"id": f"train-{index}", "question": one.question, "solution": one.solution(rng)} | traced
            file.write(json.dumps(row) + "\n")
    with (out / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for index in range(num_held_out):
            one = next(problems)
            row = {"id": f"held-out-{index}", "question": one.question, "solution": one.solution(rng)}
            file.write(json.dumps(row | {"answer": str(one.answer)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=200)
    arguments = parser.parse_args()
    write_rows(arguments.out, seed=arguments.seed, num_rows=arguments.rows, num_held_out=arguments.held_out)


if __name__ == "__main__":
    main()
