"""Dr.GRPO and DAPO: weights, masks and whole losses by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlt.algorithm.advantages import group_advantages, groups_with_signal
from megatron_rlt.algorithm.policy_loss import policy_loss
from megatron_rlt.algorithm.token_weights import (
    constant_token_weights,
    soft_overlong_punishment,
    token_weights,
    without_truncated,
)

NAN = float("nan")


def loss_of(
    weights: Tensor, lengths: list[int], rewards: list[float], ratios: list[float], clip_high: float | None
) -> float:
    """Loss of one group without division by the standard deviation; every token of completion i has `ratios[i]`."""
    advantages = group_advantages(
        torch.tensor(rewards),
        torch.ones(len(rewards), dtype=torch.bool),
        normalize_std=False,
        std_epsilon=1e-4,
        smallest_spread=0.0,
    )
    counts = torch.tensor(lengths)
    loss, _ = policy_loss(
        torch.zeros(sum(lengths)),
        old_logprobs=-torch.tensor(ratios).log().repeat_interleave(counts),
        reference_logprobs=None,
        advantages=advantages.repeat_interleave(counts),
        weights=weights.repeat_interleave(counts),
        importance=None,
        clip_low=0.2,
        clip_high=clip_high,
        beta=0.0,
    )
    return float(loss)


def test_constant_weights_by_hand() -> None:
    """Three completions count, of at most 8 tokens: 1 / (3 * 8) for every token, however long its completion."""
    weights = constant_token_weights([2, 7, 5, 0, 8], [True, False, True, True, True], max_completion_tokens=8)
    assert weights.tolist() == pytest.approx([1 / 24, 0.0, 1 / 24, 0.0, 1 / 24], abs=1e-15)


def test_constant_weights_of_nobody_are_zero() -> None:
    assert constant_token_weights([3, 4], [False, False], max_completion_tokens=4).tolist() == [0.0, 0.0]


def test_a_completion_over_the_budget_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="over 4"):
        constant_token_weights([5], [True], max_completion_tokens=4)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_constant_weights_sum_to_the_share_of_the_budget_that_was_used(lengths: list[int]) -> None:
    weights = constant_token_weights(lengths, [True] * len(lengths), max_completion_tokens=9)
    assert float(weights @ torch.tensor(lengths).double()) == pytest.approx(sum(lengths) / (9 * len(lengths)))


def test_dr_grpo_loss_by_hand() -> None:
    """Rewards 1, 0: advantages 1/2, -1/2. Lengths 2, 4 of at most 8; on policy all ratios are 1.

    Dr.GRPO: -1/2 * 1/8 * (2 * 1/2 - 4 * 1/2) = 1/16: the long wrong answer weighs more.
    GRPO's mean per sequence: -1/2 * (1/2 - 1/2) = 0: its length has spared it.
    """
    lengths, valid = [2, 4], [True, True]
    constant = constant_token_weights(lengths, valid, max_completion_tokens=8)
    per_sequence = token_weights(lengths, valid, aggregation="sequence_mean")
    assert loss_of(constant, lengths, [1.0, 0.0], [1.0, 1.0], None) == pytest.approx(1 / 16, abs=1e-7)
    assert loss_of(per_sequence, lengths, [1.0, 0.0], [1.0, 1.0], None) == pytest.approx(0.0, abs=1e-7)


def test_dapo_loss_by_hand() -> None:
    """The same group over all 6 tokens, ratios 1.5 (clipped at 1.28) and 0.5 (clipped at 0.8, advantage negative).

    -1/6 * (2 * 1.28 * 1/2 - 4 * 0.8 * 1/2) = -1/6 * (1.28 - 1.6) = 0.32 / 6.
    """
    weights = token_weights([2, 4], [True, True], aggregation="token_mean")
    assert loss_of(weights, [2, 4], [1.0, 0.0], [1.5, 0.5], 0.28) == pytest.approx(0.32 / 6, abs=1e-7)


def test_a_truncated_completion_leaves_the_loss_and_its_denominator() -> None:
    """Lengths 2, 4, 2; the second ran out: 1/4 for each token of the others, not 1/8."""
    counted = without_truncated(torch.tensor([True, True, True]), [False, True, False])
    weights = token_weights([2, 4, 2], counted.tolist(), aggregation="token_mean")
    assert weights.tolist() == [0.25, 0.0, 0.25]
    assert without_truncated(torch.tensor([True, False]), [False, False]).tolist() == [True, False]


def test_soft_punishment_by_hand() -> None:
    """Budget 20, buffer 5: nothing up to 15; 16 is 1/5 into the buffer, 18 is 3/5, 20 all of it."""
    punishment = soft_overlong_punishment([1, 15, 16, 18, 20], max_completion_tokens=20, buffer_tokens=5)
    assert punishment.tolist() == pytest.approx([0.0, 0.0, -0.2, -0.6, -1.0], abs=1e-12)


def test_soft_punishment_of_the_papers_numbers() -> None:
    """16,384 expected and 4,096 more: half of the buffer at 18,432 tokens."""
    punishment = soft_overlong_punishment([16384, 18432, 20480], max_completion_tokens=20480, buffer_tokens=4096)
    assert punishment.tolist() == [0.0, -0.5, -1.0]


def spread_of(values: list[float], valid: list[bool] | None = None, tolerance: float = 0.0) -> list[bool]:
    mask = torch.tensor(valid if valid is not None else [True] * len(values))
    found: list[bool] = groups_with_signal(torch.tensor(values), mask, group_size=3, tolerance=tolerance).tolist()
    return found


def test_groups_of_only_right_or_only_wrong_answers_have_no_spread() -> None:
    assert spread_of([1, 1, 1, 0, 0, 0, 1, 0, 1]) == [False, False, True]


def test_spread_within_the_tolerance_is_none() -> None:
    assert spread_of([0.5, 0.5, 0.75, 0.5, 0.5, 1.0], tolerance=0.25) == [False, True]


def test_invalid_completions_make_no_spread() -> None:
    """Groups: two equal beside another value; two that differ beside a nan; one valid; none valid."""
    values = [1.0, 5, 1, 0, NAN, 1, 1, 0, float("inf"), 0, 1, 2]
    valid = [True, False, True, True, False, True, True, False, False, False, False, False]
    assert spread_of(values, valid) == [False, True, False, False]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_dapos_constraint_on_the_number_of_right_answers(right: list[bool]) -> None:
    assert spread_of([float(each) for each in right]) == [0 < sum(right) < 3]


def test_what_has_no_spread_has_no_advantage() -> None:
    """The groups that are dropped are those that would not have moved the policy."""
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    mask = torch.ones(6, dtype=torch.bool)
    kept = groups_with_signal(values, mask, group_size=3, tolerance=0.0)
    for group, has_spread in zip(values.split(3), kept.tolist(), strict=True):
        advantages = group_advantages(group, mask[:3], normalize_std=False, std_epsilon=1e-4, smallest_spread=0.0)
        assert bool(advantages.abs().sum() > 0) == has_spread
