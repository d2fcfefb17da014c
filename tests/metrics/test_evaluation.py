"""avg@k, maj@k and pass@k by hand and by enumeration, with their standard errors."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.metrics.pass_at_k import Attempts, avg_at_k, maj_at_k, pass_at_k


def attempts(answers: str, right: str) -> Attempts:
    """One letter a completion; `-` is one without an answer."""
    return Attempts(tuple(each in right for each in answers), tuple(None if each == "-" else each for each in answers))


def test_avg_by_hand() -> None:
    """Shares 1/2, 0, 1: mean 1/2; squared distances 0, 1/4, 1/4 over 2: 1/4; standard error sqrt(1/4 / 3)."""
    estimate = avg_at_k([attempts("ab", "a"), attempts("bc", "a"), attempts("aa", "a")], k=2)
    assert (estimate.mean, estimate.num_problems) == (0.5, 3)
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 12), abs=1e-15)


def test_one_problem_has_no_standard_error() -> None:
    estimate = avg_at_k([attempts("ab", "a")], k=2)
    assert estimate.mean == 0.5
    assert math.isnan(estimate.standard_error)


@pytest.mark.parametrize(
    ("answers", "right", "value"),
    [
        ("aab", "a", 1.0),
        ("abb", "a", 0.0),
        ("ab", "a", 1 / 2),
        ("abc", "a", 1 / 3),
        ("aabbc", "a", 1 / 2),
        ("bc", "a", 0.0),
        ("a---", "a", 1.0),
        ("--", "a", 0.0),
        ("abcc", "ab", 1 / 2),  # a and b are two spellings of the right answer: two votes against two
        ("abccc", "ab", 0.0),
    ],
)
def test_majority_by_hand(answers: str, right: str, value: float) -> None:
    assert maj_at_k([attempts(answers, right)], k=len(answers)).mean == pytest.approx(value, abs=1e-15)


def test_majority_over_problems() -> None:
    """Values 1, 1/2: mean 3/4, squared distances 1/16 + 1/16 over 1: 1/8; standard error sqrt(1/16)."""
    estimate = maj_at_k([attempts("aa", "a"), attempts("ab", "a")], k=2)
    assert estimate.mean == 0.75
    assert estimate.standard_error == pytest.approx(0.25, abs=1e-15)


def test_pass_by_hand() -> None:
    """4 completions, 1 right: of the 6 pairs 3 miss it, so 1/2; with 3 of 4 right no pair misses."""
    estimate = pass_at_k([attempts("abbb", "a"), attempts("aaab", "a")], k=2)
    assert estimate.mean == 0.75
    assert pass_at_k([attempts("abbb", "a")], k=4).mean == 1.0
    assert pass_at_k([attempts("bbbb", "a")], k=4).mean == 0.0


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    choices = list(itertools.combinations(correct, k))
    expected = sum(any(choice) for choice in choices) / len(choices)
    problem = Attempts(tuple(correct), (None,) * len(correct))
    assert pass_at_k([problem], k=k).mean == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_pass_at_one_is_the_average(correct: list[bool]) -> None:
    problem = Attempts(tuple(correct), (None,) * len(correct))
    assert pass_at_k([problem], k=1).mean == pytest.approx(avg_at_k([problem], k=len(correct)).mean, abs=1e-12)


@pytest.mark.parametrize("estimate", [avg_at_k, maj_at_k])
def test_another_number_of_completions_is_refused(estimate: object) -> None:
    assert callable(estimate)
    with pytest.raises(ValueError, match="problem 2 has 3 completions and needs exactly k = 2"):
        estimate([attempts("ab", "a"), attempts("abb", "a")], k=2)


def test_too_few_completions_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="problem 1 has 2 completions and needs at least k = 3"):
        pass_at_k([attempts("ab", "a")], k=3)
    with pytest.raises(ValueError, match="no problems"):
        avg_at_k([], k=1)
