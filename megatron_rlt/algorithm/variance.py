"""Which term of the reward the advantages come from: each term's share of their variance.

A term that is large but equal for all completions of a prompt teaches nothing; this tells it from one that does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import centre_and_scale


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
