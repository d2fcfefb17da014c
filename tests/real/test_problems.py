"""Word problems: their arithmetic, their traces, and the files of a seed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from tools.real.problems import Style, WordProblem, draw_problem, style_of, trace, write_rows

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
        read.append(style_of(problem, trace(rng, problem, style)))
    assert read == [style] * len(read)


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
