"""Answers are read behind the solution tag, or from the whole completion of a model that knows no tags."""

from __future__ import annotations

import pytest

from megatron_rlt.jobs.reward.judging import AnswerJudge
from megatron_rlt.prompts.tags import R1, STRATOS
from megatron_rlt.rewards.countdown_problems import draw_countdown
from megatron_rlt.rewards.verifiable import Verdict, VerifiableKind
from megatron_rlt.types import Problem

PROBLEM = Problem("p", "3 + 4?", "7")


def test_only_what_follows_the_last_solution_tag_is_the_answer() -> None:
    judge = AnswerJudge("exact", STRATOS, timeout_seconds=1.0)
    text = "It is 7.<|end_of_thought|>\n\n<|begin_of_solution|>8<|end_of_solution|> 7"
    assert judge.verdict(PROBLEM, text) == Verdict(False, "8", "wrong")
    assert judge.verdict(PROBLEM, f"{text}<|begin_of_solution|> so 7") == Verdict(True, "7", "correct")


def test_a_completion_without_the_tag_is_judged_as_a_whole() -> None:
    judge = AnswerJudge("exact", STRATOS, timeout_seconds=1.0)
    assert judge.verdict(PROBLEM, "We add and get 7") == Verdict(True, "7", "correct")
    assert judge.verdict(PROBLEM, "") == Verdict(False, None, "no answer")


def test_what_follows_the_thought_is_the_answer_where_solutions_have_no_tags() -> None:
    judge = AnswerJudge("exact", R1, timeout_seconds=1.0)
    assert judge.verdict(PROBLEM, "It is 7.\n</think>\n\n8") == Verdict(False, "8", "wrong")
    assert judge.verdict(PROBLEM, "It is 8.\n</think>\n\nso 7") == Verdict(True, "7", "correct")
    assert judge.verdict(PROBLEM, "<think>\nWe add and get 7") == Verdict(True, "7", "correct")


@pytest.mark.parametrize(
    ("kind", "solution"),
    [("exact", "7"), ("math", "It is $\\boxed{7}$."), ("math", "7"), ("choice", "The answer is B.")],
)
def test_newlines_around_a_reference_change_no_verdict(kind: VerifiableKind, solution: str) -> None:
    """Rows of Bespoke-Stratos bring them."""
    with AnswerJudge(kind, STRATOS, timeout_seconds=5.0) as judge:
        for text in ("7", "\\boxed{7}", "B", "The answer is 8."):
            plain, padded = (Problem("p", "3 + 4?", one) for one in (solution, f"\n\n{solution}\n\n"))
            judge.check(padded)
            assert judge.verdict(padded, text) == judge.verdict(plain, text)


def test_countdown_solutions_are_right_with_and_without_tags() -> None:
    sizes = {"num_numbers": 3, "largest_number": 9, "smallest_target": 5, "largest_target": 60, "use_all": True}
    judge = AnswerJudge("countdown", STRATOS, timeout_seconds=1.0)
    for number, drawn in enumerate(draw_countdown(3, 5, **sizes)):
        problem = drawn.row(f"c{number}")
        judge.check(problem)
        tagged = f"<|end_of_thought|>\n\n<|begin_of_solution|>{drawn.solution}<|end_of_solution|>"
        assert judge.verdict(problem, tagged).correct
        assert judge.verdict(problem, f"Let us see.\n{drawn.expression}").correct
        assert judge.verdict(problem, f"{drawn.expression} + 1").reason == "other numbers"
