"""Countdown: exact arithmetic, the rules about numbers, and problems drawn from a seed."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.rewards.countdown import CountdownTask, expression_of, read_task, why_wrong
from megatron_rlt.rewards.countdown_problems import CountdownProblem, draw_countdown

ALL = CountdownTask((3, 8, 8, 3), 24, use_all=True)
SOME = CountdownTask((3, 5, 2, 9), 16, use_all=False)


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("8/(3-8/3)", None),  # 8 / (1/3): right only without rounding
        ("8 / (3 - 8 / 3) = 24", None),
        ("8/(3-8/3) = 25", "wrong value"),
        ("8*3", "other numbers"),
        ("8*3*(8/8)", "other numbers"),
        ("8*3+8-8", "other numbers"),
        ("8/(3-3)+8", "division by zero"),
        ("8+8+3+3", "wrong value"),
    ],
)
def test_every_number_exactly_once(expression: str, fault: str | None) -> None:
    assert why_wrong(expression, ALL) == fault


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("(3+5)*2", None),
        ("5+2+9", None),
        ("2*(3+5)+9-9", "other numbers"),
        ("16", "other numbers"),
        ("9+2+3", "wrong value"),
        ("2**5 - 16", "not an expression"),
        ("9//2", "not an expression"),
        ("-(2-9*2)", "not an expression"),
        ("+9+5+2", "not an expression"),
        ("5(3)", "not an expression"),
        ("5.0+9+2", "not an expression"),
        ("()", "not an expression"),
        ("", "not an expression"),
        ("9+", "not an expression"),
        ("09+5+2", "not an expression"),
        ("__import__('os')", "not an expression"),
        ("(" * 140 + "9" + ")" * 140, "wrong value"),
        ("9+" * 200 + "9", "not an expression"),
        ("3+5=8, 8*2=16", "wrong value"),
    ],
)
def test_each_number_at_most_once(expression: str, fault: str | None) -> None:
    assert why_wrong(expression, SOME) == fault


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"So \boxed{(3+5) \times 2}", "(3+5) * 2"),
        ("3 + 5 is 8.\nAnswer: `(3+5)*2 = 16`\n", "(3+5)*2 = 16"),
        (r"$\left(9 − 1\right) \cdot 6 ÷ 3$.", "(9 - 1) * 6 / 3"),
        ("", ""),
    ],
)
def test_the_expression_is_the_box_or_the_last_line(text: str, expression: str) -> None:
    assert expression_of(text) == expression


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("Using the numbers [19, 36, 55, 7], create an equation that equals 65.", ((19, 36, 55, 7), 65, False)),
        ("Take all the numbers 3, 4 and 5 to reach 23!", ((3, 4, 5), 23, True)),
        ("Numbers? Use the numbers 1 2 3 exactly once. The target is 6", ((1, 2, 3), 6, True)),
    ],
)
def test_common_wordings_are_read(question: str, task: tuple[tuple[int, ...], int, bool]) -> None:
    assert read_task(question) == CountdownTask(*task)


def test_a_question_that_states_no_task_is_not_read() -> None:
    assert read_task("Using the numbers one and two, make 3") is None
    assert read_task("Using the numbers 1 and 2, make three") is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 999), min_size=2, max_size=6), st.integers(1, 9999), st.booleans())
def test_a_question_says_all_of_its_task(numbers: list[int], target: int, use_all: bool) -> None:
    task = CountdownTask(tuple(numbers), target, use_all)
    assert read_task(task.question) == task


def drawn(seed: int, count: int, *, use_all: bool = True) -> list[CountdownProblem]:
    return draw_countdown(
        seed, count, num_numbers=4, largest_number=50, smallest_target=10, largest_target=99, use_all=use_all
    )


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), use_all=st.booleans())
def test_every_problem_is_solved_by_its_solution(seed: int, use_all: bool) -> None:
    for problem in drawn(seed, 5, use_all=use_all):
        assert 10 <= problem.task.target <= 99
        assert problem.task.target not in problem.task.numbers
        assert all(1 <= number <= 50 for number in problem.task.numbers)
        assert why_wrong(problem.solution, problem.task) is None
        # All numbers are used in either case.
        assert why_wrong(problem.expression, CountdownTask(problem.task.numbers, problem.task.target, True)) is None


def test_a_seed_gives_the_same_problems_everywhere() -> None:
    """The digest pins what other machines and later versions must draw, too."""
    problems = drawn(7, 200)
    text = "\n".join(f"{problem.question} {problem.solution}" for problem in problems)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "87bdc4dc8b05874d"
    assert drawn(7, 50) == problems[:50]
    assert drawn(8, 50) != problems[:50]


def test_no_problem_comes_twice() -> None:
    """5 * 6 / 2 = 15 pairs of 1 to 5 exist; sorted numbers and target tell problems apart."""
    problems = draw_countdown(
        0, 15, num_numbers=2, largest_number=5, smallest_target=1, largest_target=25, use_all=True
    )
    assert len({(tuple(sorted(problem.task.numbers)), problem.task.target) for problem in problems}) == 15


def test_more_problems_than_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only \d of 3 different problems .* ask for fewer or widen"):
        draw_countdown(0, 3, num_numbers=2, largest_number=2, smallest_target=3, largest_target=3, use_all=True)


def test_a_problem_is_a_row() -> None:
    row = drawn(0, 1)[0].row("countdown-0")
    assert (row.problem_id, row.reasoning_trace) == ("countdown-0", None)
    assert why_wrong(row.solution, read_task(row.question) or SOME) is None
