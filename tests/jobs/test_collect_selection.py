"""Which explanations become training rows: every rule by hand."""

from __future__ import annotations

import pytest

from megatron_rlt.config.commands.collect import SelectionConfig
from megatron_rlt.jobs.collect.selection import Candidate, Choice, Note, select

# Rewards with a tie for the best (1 and 3), one that was dropped (0), one malformed with the highest reward of all (4).
CANDIDATES = (
    Candidate(None, 90, well_formed=True),
    Candidate(-0.5, 120, well_formed=True),
    Candidate(-2.0, 80, well_formed=True),
    Candidate(-0.5, 60, well_formed=True),
    Candidate(9.0, 10, well_formed=False),
)
MALFORMED = (
    Candidate(None, 40, well_formed=False, is_blank=True),
    Candidate(-3.0, 50, well_formed=False),
    Candidate(-1.0, 70, well_formed=False),
)


def chosen(candidates: tuple[Candidate, ...], **settings: object) -> tuple[tuple[int, ...], set[Note]]:
    choice = select(candidates, SelectionConfig.model_validate(settings))
    return choice.indices, set(choice.notes)


def test_first_takes_the_first_that_is_well_formed() -> None:
    assert chosen(CANDIDATES, rule="first") == ((0,), set())
    assert chosen(tuple(reversed(CANDIDATES)), rule="first") == ((1,), set())


def test_best_of_n_takes_the_highest_reward_and_of_equals_the_earlier() -> None:
    assert chosen(CANDIDATES, rule="best_of_n") == ((1,), set())
    assert chosen(CANDIDATES[2:], rule="best_of_n") == ((1,), set())


def test_an_explanation_without_a_reward_comes_after_all_that_have_one() -> None:
    assert chosen((Candidate(None, 5, True), Candidate(-1e9, 5, True)), rule="best_of_n") == ((1,), set())
    nothing_scored = (Candidate(None, 9, True), Candidate(None, 5, True))
    assert chosen(nothing_scored, rule="best_of_n") == ((0,), {Note.NO_REWARD})


@pytest.mark.parametrize(
    ("limit", "index", "notes"),
    [
        (120, 1, set()),  # all fit: the tie goes to the earlier
        (119, 3, set()),  # the first of the best two is too long
        (80, 3, set()),
        (60, 3, set()),  # exactly as long as the limit fits
        (59, 1, {Note.TOO_LONG}),  # none fits: the best by reward, however long
    ],
)
def test_best_of_n_takes_the_best_that_fits_or_else_the_best(limit: int, index: int, notes: set[Note]) -> None:
    assert chosen(CANDIDATES, rule="best_of_n", max_student_tokens=limit) == ((index,), notes)


def test_best_of_n_without_rewards_takes_the_first_that_fits() -> None:
    candidates = (Candidate(None, 9, True), Candidate(None, 5, True), Candidate(None, 4, True))
    assert chosen(candidates, rule="best_of_n", max_student_tokens=5) == ((1,), {Note.NO_REWARD})
    assert chosen(candidates, rule="best_of_n", max_student_tokens=3) == ((0,), {Note.NO_REWARD, Note.TOO_LONG})


def test_all_takes_every_well_formed_one() -> None:
    assert chosen(CANDIDATES, rule="all") == ((0, 1, 2, 3), set())


def test_a_limit_of_tokens_holds_for_first_and_all_too() -> None:
    candidates = (Candidate(None, 9, True), Candidate(None, 5, True), Candidate(None, 4, True))
    assert chosen(candidates, rule="first", max_student_tokens=5) == ((1,), set())
    assert chosen(candidates, rule="all", max_student_tokens=5) == ((1, 2), set())
    assert chosen(candidates, rule="first", max_student_tokens=3) == ((0,), {Note.TOO_LONG})
    assert chosen(candidates, rule="all", max_student_tokens=3) == ((0, 1, 2), {Note.TOO_LONG})


def test_malformed_ones_are_a_last_resort_never_taken_or_taken_like_others() -> None:
    assert chosen(MALFORMED, rule="best_of_n") == ((2,), {Note.MALFORMED})
    assert chosen(MALFORMED, rule="first") == ((1,), {Note.MALFORMED})
    assert chosen(MALFORMED, rule="all") == ((1, 2), {Note.MALFORMED})
    assert chosen(MALFORMED, rule="first", malformed="never") == ((), {Note.LEFT_OUT})
    assert chosen(CANDIDATES, rule="best_of_n", malformed="allowed") == ((4,), set())
    assert chosen(CANDIDATES, rule="best_of_n", malformed="never") == ((1,), set())


def test_white_space_is_never_a_training_row() -> None:
    assert chosen(MALFORMED[:1], rule="first", malformed="allowed") == ((), {Note.LEFT_OUT})


def test_every_explanation_too_long_and_malformed_is_noted_as_both() -> None:
    assert chosen(MALFORMED, rule="best_of_n", max_student_tokens=1) == ((2,), {Note.MALFORMED, Note.TOO_LONG})


def test_other_selections_have_other_names() -> None:
    settings = [
        {"rule": "first"},
        {"rule": "all"},
        {"rule": "best_of_n", "max_student_tokens": 512},
        {"rule": "best_of_n", "max_student_tokens": 1024},
        {"rule": "first", "malformed": "never"},
        {"rule": "first", "malformed": "allowed"},
    ]
    names = [SelectionConfig.model_validate(setting).name for setting in settings]
    assert len(set(names)) == len(names)
    assert names[2] == "best_of_n_512"
    assert select((), SelectionConfig()) == Choice((), frozenset({Note.LEFT_OUT}))
