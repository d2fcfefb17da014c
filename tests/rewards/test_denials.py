"""Prose that denies a value does not answer with it."""

from __future__ import annotations

import pytest

from megatron_rlt.rewards.denials import stated_part
from megatron_rlt.rewards.mathematics import MathJudge


@pytest.mark.parametrize(
    "prose",
    [
        *("It is not 42.", "not 42", "It isn't 42.", "42 is wrong.", "It cannot be 42.", "It is never 42."),
        *("It is at least 42.", "It is less than 42.", "no more than $42$", "It is 41 or 42, I do not know."),
        *("So we get 42.\nBut it is not 42.", "It lies between 40 and 42."),
    ],
)
def test_of_a_sentence_whose_values_are_denied_nothing_is_left(prose: str) -> None:
    assert stated_part(prose) is None


@pytest.mark.parametrize(
    ("prose", "stated"),
    [
        ("It is 42, not 41.", "It is 42"),
        ("It is 42 rather than 41.", "It is 42 "),
        ("It is never 41, but 42.", "42"),
        ("The triangle is not isosceles, so its area is 42.", "its area is 42"),
        ("The point is $(1, 2)$, not $(2, 1)$.", "The point is $(1, 2)$"),
        ("It is 0.5, not 0.25.", "It is 0.5"),
    ],
)
def test_of_several_values_the_one_that_is_not_denied_is_stated(prose: str, stated: str) -> None:
    part = stated_part(prose)
    assert part is not None
    assert part.strip() == stated.strip()


@pytest.mark.parametrize(
    "prose",
    ["It is not 41. It is 42.", "Tom has 42 more than Ann.", "So 42.\nI am not surprised.", "no numbers, not one"],
)
def test_prose_that_denies_nothing_at_its_end_stays(prose: str) -> None:
    assert stated_part(prose) == prose


def test_the_statement_behind_answer_is_counts_and_not_what_follows() -> None:
    with MathJudge(timeout_seconds=20.0) as judge:
        for answer in ("The answer is 42. It is not 41.", "The answer is 42, since 41 is not even."):
            assert judge.compare(answer, "42").outcome == "equal"
            assert judge.compare(answer, "41").outcome == "different"
        assert judge.compare("The answer is not 42.", "42").outcome == "unreadable answer"
