"""Ranks within questions and what two rankings have in common, by hand."""

from __future__ import annotations

import math

import pytest

from megatron_rlt.rewards.ranking import RankingChange, compare_rankings, rank_correlation, ranks_within


def test_ranks_count_within_a_question_ties_keep_their_order_and_none_takes_no_place() -> None:
    questions = ["a", "b", "a", "a", "b", "a", "c"]
    rewards = [-2.0, -1.0, None, -1.0, -3.0, -2.0, None]
    assert ranks_within(questions, rewards) == [2, 1, None, 1, 2, 3, None]


def test_spearman_by_hand() -> None:
    """Without ties 1 - 6 * sum d^2 / (n (n^2 - 1)): d = (0, 1, -1, 0) gives 1 - 12 / 60."""
    assert rank_correlation([-4.0, -3.0, -2.0, -1.0], [0.0, 2.0, 1.0, 9.0]) == pytest.approx(0.8, abs=1e-15)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0


def test_spearman_with_ties_shares_the_mean_rank() -> None:
    """Ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 0.25 + 0 + 1 + ... = 1.5, spreads 1.5 and 2."""
    assert rank_correlation([5.0, 5.0, 7.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(1.5 * 2), abs=1e-15)
    assert math.isnan(rank_correlation([5.0, 5.0], [1.0, 2.0]))


def test_rankings_are_compared_over_the_explanations_that_have_both_rewards() -> None:
    """`a` changes its best and turns round; `b` keeps it; `c` has one pair of rewards only."""
    questions = ["a", "a", "b", "b", "b", "c", "c"]
    old = [-1.0, -2.0, -1.0, None, -4.0, -1.0, -2.0]
    new = [-2.0, -1.0, -3.0, -1.0, -5.0, None, -1.0]
    assert compare_rankings(questions, old, new) == RankingChange(3, 2, 0.5, 0.0)


def test_without_a_choice_there_is_nothing_to_compare() -> None:
    change = compare_rankings(["a", "b"], [-1.0, -2.0], [-1.0, -2.0])
    assert (change.num_questions, change.num_with_choice) == (2, 0)
    assert math.isnan(change.best_changed)
    assert math.isnan(change.mean_correlation)
