"""Group-relative advantages (GRPO, arXiv 2402.03300): how much better a completion did than others of its prompt.

In: the rewards of one group and which of them exist. Out: one advantage a completion. Leaves to others: rewards,
weights of tokens, the loss.
"""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards: Tensor, valid: Tensor, *, normalize_std: bool, std_epsilon: float) -> Tensor:
    """`[G]` float64: `(r - mean) / (std + std_epsilon)` over the valid completions of one group, unbiased std.

    Invalid completions get 0 and do not touch the others, whatever their reward holds. With fewer than two valid
    ones there is nothing to compare and all are 0.

    Args:
        rewards: `[G]`.
        valid: `[G]` bool.
        normalize_std: False leaves out the division.
        std_epsilon: keeps groups of nearly equal rewards from being blown up.
    """
    advantages = rewards.new_zeros(rewards.shape).double()
    if int(valid.sum()) < 2:
        return advantages
    assert bool(rewards[valid].isfinite().all()), "a valid completion has a finite reward"
    centred, scale = centre_and_scale(rewards[valid].double(), normalize_std=normalize_std, std_epsilon=std_epsilon)
    advantages[valid] = centred / scale
    return advantages


def centre_and_scale(rewards: Tensor, *, normalize_std: bool, std_epsilon: float) -> tuple[Tensor, float]:
    """Rewards `[G]`, G >= 2, minus their mean, and what an advantage divides them by."""
    scale = float(rewards.std(unbiased=True)) + std_epsilon if normalize_std else 1.0
    return rewards - rewards.mean(), scale
