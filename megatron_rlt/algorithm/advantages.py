"""Group-relative advantages (GRPO, arXiv 2402.03300): how a completion's reward compares with its group's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, valid: Tensor, *, normalize_std: bool, std_epsilon: float, smallest_spread: float
) -> Tensor:
    """`[G]` float64: `(r - mean) / (std + std_epsilon)` over the valid completions of one group, unbiased std.

    Invalid completions get 0 and do not affect the others. With fewer than two valid ones all are 0, and so they are
    in a group within the noise.

    Args:
        rewards, valid: `[G]` floats and bool.
        normalize_std: False omits the division.
        std_epsilon: limits the advantages of groups with nearly equal rewards.
        smallest_spread: as of `is_within_noise`.
    """
    advantages = rewards.new_zeros(rewards.shape).double()
    if int(valid.sum()) < 2 or is_within_noise(rewards, valid, smallest_spread=smallest_spread):
        return advantages
    assert bool(rewards[valid].isfinite().all()), "a valid completion has a finite reward"
    centred, scale = centre_and_scale(rewards[valid].double(), normalize_std=normalize_std, std_epsilon=std_epsilon)
    advantages[valid] = centred / scale
    return advantages


def is_within_noise(rewards: Tensor, valid: Tensor, *, smallest_spread: float) -> bool:
    """Whether the valid rewards of a group, `[G]`, differ so little that noise of the scorer could have made it all.

    Their unbiased standard deviation is below `smallest_spread`, 0 for an exact scorer. A group with fewer than two
    valid ones has no spread to judge.
    """
    return int(valid.sum()) >= 2 and float(rewards[valid].double().std(unbiased=True)) < smallest_spread


def within_group_std(errors: Sequence[Tensor]) -> float:
    """Standard deviation of a scorer's errors within groups, `[G]` each, pooled: an error that all of a group share
    moves no advantage and does not count. 0 if no group has two."""
    squares = [(group.double() - group.double().mean()).square().sum() for group in errors if len(group) > 1]
    freedom = sum(len(group) - 1 for group in errors if len(group) > 1)
    return math.sqrt(float(sum(squares)) / freedom) if freedom else 0.0


def centre_and_scale(rewards: Tensor, *, normalize_std: bool, std_epsilon: float) -> tuple[Tensor, float]:
    """Rewards `[G]`, G >= 2, minus their mean, and the divisor of the advantages."""
    scale = float(rewards.std(unbiased=True)) + std_epsilon if normalize_std else 1.0
    return rewards - rewards.mean(), scale


def groups_with_signal(values: Tensor, valid: Tensor, *, group_size: int, tolerance: float) -> Tensor:
    """`[Q]` bool: groups to train on (dynamic sampling of DAPO, arXiv 2503.14476); drop and replace the others.

    A group has a signal if the values of its valid completions differ by more than `tolerance` >= 0; one with fewer
    than two valid completions has none. With values 1 and 0 for correct and wrong answers and tolerance 0 this is
    DAPO's constraint `0 < number of correct answers < G`; like DAPO, pass the verdicts and not the whole reward, in
    which terms of length or format always differ.

    Args:
        values, valid: `[Q * group_size]` floats and bool, grouped by question; invalid values are ignored.
    """
    usable = valid.reshape(-1, group_size)
    grouped = values.double().reshape(-1, group_size)
    largest = torch.where(usable, grouped, -torch.inf).max(dim=1).values
    smallest = torch.where(usable, grouped, torch.inf).min(dim=1).values
    # No valid completion: -inf - inf is -inf; one: 0.
    return largest - smallest > tolerance


def advantage_variance_shares(
    terms: Mapping[str, Tensor], group_ids: Tensor, valid: Tensor, *, normalize_std: bool, std_epsilon: float
) -> dict[str, float]:
    """Share of each reward term in the variance of the advantages, by its covariance with them within the groups.

    A term that is large but equal for all completions of a prompt has share 0: it teaches nothing. The shares sum to 1,
    since the advantage is the sum of its centred, scaled terms. A share is negative if the term works against the
    others. All are 0 if the rewards vary in no group.

    Args:
        terms: `[N]` each, signed summands of the reward.
        group_ids: `[N]` int, equal for completions of one prompt.
        valid: `[N]` bool; the other completions are ignored.
    """
    covariances = dict.fromkeys(terms, 0.0)
    for group in torch.unique(group_ids[valid]).tolist():
        members = valid & (group_ids == group)
        if int(members.sum()) < 2:
            continue
        own = {name: values[members].double() for name, values in terms.items()}
        rewards = torch.stack(list(own.values())).sum(0)
        centred, scale = centre_and_scale(rewards, normalize_std=normalize_std, std_epsilon=std_epsilon)
        for name, values in own.items():
            covariances[name] += float(((values - values.mean()) * centred).sum()) / scale**2
    total = sum(covariances.values())
    return {name: covariance / total if total > 0 else 0.0 for name, covariance in covariances.items()}
