"""Group-relative advantages (GRPO, arXiv 2402.03300): how much better a completion did than others of its prompt.

In: the rewards of one group and which of them exist. Out: one advantage a completion. Leaves to others: rewards,
weights of tokens, the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
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


# Dynamic sampling (DAPO, arXiv 2503.14476): groups whose completions all earn the same teach nothing.
#
# In: what the completions of one batch earned. Out: which groups have spread. Sampling new questions in place of the
# others, counting them, and giving up after a while are the job's.
def groups_with_spread(values: Tensor, valid: Tensor, *, group_size: int, tolerance: float) -> Tensor:
    """`[Q]` bool: the groups to train on; the others are to be dropped and replaced.

    A group has spread if the largest and the smallest value of its valid completions differ by more than `tolerance`.
    One with fewer than two valid completions has none. With values 1 and 0 for right and wrong answers and tolerance 0
    this is DAPO's constraint `0 < number of right answers < G`; like DAPO, give it the verdicts and not the whole
    reward, in which terms of length or form differ always.

    Args:
        values: `[Q * group_size]`, the groups one after another.
        valid: `[Q * group_size]` bool; the others take no part, whatever their value holds.
        group_size: completions of each question.
        tolerance: differences up to it count as none; >= 0.
    """
    usable = valid.reshape(-1, group_size)
    grouped = values.double().reshape(-1, group_size)
    largest = torch.where(usable, grouped, -torch.inf).max(dim=1).values
    smallest = torch.where(usable, grouped, torch.inf).min(dim=1).values
    # No valid completion: -inf - inf is -inf; one: 0.
    return largest - smallest > tolerance


# Which term of the reward the advantages come from: each term's share of their variance.
#
# A term that is large but equal for all completions of a prompt teaches nothing; this tells it from one that does.
def advantage_variance_shares(
    terms: Mapping[str, Tensor], group_ids: Tensor, valid: Tensor, *, normalize_std: bool, std_epsilon: float
) -> dict[str, float]:
    """Share of each term in the variance of the advantages, by its covariance with them within the groups.

    Since the advantage is the sum of its centred, scaled terms, its variance is the sum of their covariances with it:
    the shares sum to 1. One is negative where a term works against the others. All are 0 where no group's rewards
    vary: there is no variance to share.

    Args:
        terms: `[N]` each, summands of the reward with their signs.
        group_ids: `[N]` int: completions of one prompt have the same.
        valid: `[N]` bool; the others take no part.
        normalize_std, std_epsilon: as in `group_advantages`.
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
