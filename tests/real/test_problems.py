"""Word problems: their arithmetic, their traces, and the files of a seed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tools.real.problems import Style, WordProblem, answer_of, draw_problem, style_of, trace, write_rows

SEEDS = range(200)


def worked(problem: WordProblem) -> int:
    """The answer by the steps' own signs, from the number in the question."""
    number = int(re.search(r"has (\d+)", problem.question).group(1))  # type: ignore[union-attr]
    for step in problem.steps:
        number = {"+": number + step.n, "-": number - step.n, "*": number * step.n, "/": number // step.n}[step.sign]
        assert re.search(rf"\b{step.n}\b", step.words)
    return number


def test_answers_follow_from_the_questions() -> None:
    for seed in SEEDS:
        problem = draw_problem(random.Random(seed))
        assert problem.answer == worked(problem)
        assert 2 <= len(problem.steps) <= 4
        assert all(step.before % step.n == 0 for step in problem.steps if step.sign == "/")
        assert 0 < problem.answer < 1000
        assert problem.solution(random.Random(seed)).endswith(f"\\boxed{{{problem.answer}}}")


@pytest.mark.parametrize("style", list(Style))
def test_a_trace_reads_as_the_style_that_it_was_written_in(style: Style) -> None:
    read = []
    for seed in SEEDS:
        rng = random.Random(seed)
        problem = draw_problem(rng)
        solution = problem.solution(rng)
        read.append(style_of(problem.question, answer_of(solution), trace(rng, problem, style)))
    assert read == [style] * len(read)


QUESTION = "Ivo has 12 coins. Ivo buys 8 more coins. Later Ivo keeps only one of every 4 coins. How many coins?"


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("12 + 8 = 20. Now 20 / 4 gives 5. Hence 5.", Style.CAREFUL),
        ("12 + 8 = 20. Hence 5.", Style.SLOPPY),  # a step is missing
        ("12 + 8 = 20. Now 20 / 4 gives 6. Hence 5.", Style.SLOPPY),  # wrong
        ("12 + 8 = 20. Now 9 - 4 gives 5. Hence 5.", Style.SLOPPY),  # right, but from another number
        ("12 + 8 = 20. Now 20 / 0 gives 5. Hence 5.", Style.SLOPPY),
        ("12 - 7 = 5. Hence 5.", Style.SLOPPY),  # right, to the answer, but of another question
        ("Hence 5.", Style.LEAP),
    ],
)
def test_an_explanation_is_careful_if_every_step_is_there_and_right(text: str, style: Style) -> None:
    """(12 + 8) / 4 = 5."""
    assert style_of(QUESTION, "5", text) is style


def test_a_seed_gives_its_bytes_and_no_question_twice(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_rows(tmp_path / name, seed=seed, num_rows=300, num_held_out=40)
    first, same, other = (
        [(tmp_path / name / file).read_bytes() for file in ("train.jsonl", "held_out.jsonl")] for name in "abc"
    )
    assert first == same != other
    rows = [json.loads(line) for part in first for line in part.splitlines()]
    assert len({row["question"] for row in rows}) == 340
    traces = {re.sub(r"\d+", "#", row["reasoning_trace"]) for row in rows[:300]}
    assert len(traces) > 150  # forms, whatever their numbers: nothing to learn by heart
