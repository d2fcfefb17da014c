"""Importance weights and masks, by hand; and their place in the loss."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlt.algorithm.policy_loss import policy_loss
from megatron_rlt.algorithm.rollout_mismatch import (
    sequence_importance,
    sequences_within,
    token_importance,
    tokens_within,
)

# old - rollout of two completions: ratios 1/2, 3, 1 | 4, 1/2. Products 1.5 and 2, geometric means 1.1447 and 1.4142.
LOG_RATIOS = [torch.tensor([0.5, 3.0, 1.0]).log(), torch.tensor([4.0, 0.5]).log()]


def test_token_weights_are_ratios_cut_at_the_cap() -> None:
    first, second = token_importance(LOG_RATIOS, cap=2.0)
    assert first.tolist() == pytest.approx([0.5, 2.0, 1.0])
    assert second.tolist() == pytest.approx([2.0, 0.5])


def test_sequence_weights_are_the_completions_ratio_cut_at_the_cap() -> None:
    first, second = sequence_importance(LOG_RATIOS, cap=1.75)
    assert first.tolist() == pytest.approx([1.5] * 3)
    assert second.tolist() == [1.75] * 2
    (long,) = sequence_importance([torch.full((2000,), 1.0)], cap=2.0)
    assert long.tolist() == [2.0] * 2000, "a ratio that overflows is cut like any other"


@pytest.mark.parametrize(
    ("low", "high", "first", "second"),
    [
        (0.6, None, [False, True, True], [True, False]),
        (None, 3.5, [True, True, True], [False, True]),
        (0.6, 2.0, [False, False, True], [False, False]),
    ],
)
def test_tokens_outside_the_bounds_are_masked(
    low: float | None, high: float | None, first: list[bool], second: list[bool]
) -> None:
    masks = tokens_within(LOG_RATIOS, low=low, high=high)
    assert [mask.tolist() for mask in masks] == [first, second]


def test_completions_outside_the_bounds_of_the_geometric_mean_are_masked() -> None:
    assert sequences_within(LOG_RATIOS, low=None, high=1.2).tolist() == [True, False]
    assert sequences_within(LOG_RATIOS, low=1.2, high=None).tolist() == [False, True]
    longer = [ratios.repeat(50) for ratios in LOG_RATIOS]
    assert sequences_within(longer, low=None, high=1.2).tolist() == [True, False], "whatever their length"


def test_a_nan_lies_outside_every_bound() -> None:
    broken = [torch.tensor([0.0, math.nan])]
    assert tokens_within(broken, low=0.5, high=None)[0].tolist() == [True, False]
    assert sequences_within(broken, low=None, high=9.0).tolist() == [False]


def test_a_weight_multiplies_the_policys_part_of_the_loss_and_not_the_kl() -> None:
    """Ratio 1, advantages 2 and -1, weights 1/4 and 3/4, importance 1/2 and 2; reference = new + ln 2, beta 0.1.

    Policy: -(1/4 * 1/2 * 2 - 3/4 * 2 * 1) = 1.25, its gradient by new -(1/4, -3/2). KL: 0.1 * (1 - ln 2), with
    gradient 0.1 * w * (1 - 2).
    """
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, sums = policy_loss(
        new,
        old_logprobs=None,
        reference_logprobs=new.detach() + math.log(2),
        advantages=torch.tensor([2.0, -1.0]),
        weights=torch.tensor([0.25, 0.75]),
        importance=torch.tensor([0.5, 2.0]),
        clip_low=None,
        clip_high=None,
        beta=0.1,
    )
    assert float(loss.detach()) == pytest.approx(1.25 + 0.1 * (1 - math.log(2)), abs=1e-6)
    assert float(sums.policy) == pytest.approx(1.25, abs=1e-6)
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-0.25 - 0.025, 1.5 - 0.075], abs=1e-6)
