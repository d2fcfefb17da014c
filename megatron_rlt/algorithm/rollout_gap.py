"""How far the sampling engine's log-probs are from the trainer's, of the same tokens and the same weights.

In: both log-probs of every completion of a step. Out: the gap in numbers, and which token is worst. Engine and trainer
are two programs: what they disagree about makes on-policy training silently off-policy (Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.policy_loss import k3

_HIGH_SHARE = 0.99


@dataclass(frozen=True)
class RolloutGap:
    """Of all tokens of a step: `|rollout - old|` in nats, and the divergence it amounts to. NaN stays visible."""

    mean: float
    p99: float  # at least 99 % of the tokens have at most this (nearest rank)
    maximum: float
    sequence_kl: float  # nats a completion, see `sequence_kl`
    worst_completion: int  # the one that holds the maximum
    worst_token: int  # its place in that completion


def rollout_gap(rollout: Sequence[Tensor], old: Sequence[Tensor]) -> RolloutGap:
    """Compare completions; at least one token in all.

    Args:
        rollout: `[C_i]` each, log-probs by the sampling engine.
        old: `[C_i]` each, by the trainer before the update.
    """
    gap = (torch.cat(list(rollout)) - torch.cat(list(old))).abs()
    worst = int(gap.argmax())  # a NaN is the largest of all
    lengths = [len(values) for values in rollout]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    completion = max(index for index, start in enumerate(starts) if start <= worst and lengths[index] > 0)
    return RolloutGap(
        mean=float(gap.mean()),
        p99=quantile(gap, _HIGH_SHARE),
        maximum=float(gap.max()),
        sequence_kl=sequence_kl(rollout, old),
        worst_completion=completion,
        worst_token=worst - starts[completion],
    )


def quantile(values: Tensor, share: float) -> float:
    """The smallest of `[T]` values that at least a share of them does not exceed (nearest rank).

    `torch.quantile` takes 16 million values at most; a step may have more.
    """
    return float(values.kthvalue(math.ceil(share * len(values))).values)


def sequence_kl(rollout: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """KL(engine || trainer) of whole completions in nats, estimated from the engine's own samples.

    The estimator is `mean_i sum_t (exp(x_it) - 1 - x_it)` with `x = old - rollout`: k3 (Schulman 2020, "Approximating
    KL Divergence") at every token, added up over the completion. By the chain rule the divergence of sequences is the
    expected sum of the divergences of their next tokens, and k3 is unbiased for each of these, so the sum is unbiased
    too; it is never negative. k3 of the whole sequence's ratio would be unbiased as well, but its variance grows
    exponentially with the length. Unbiased only where the engine samples from its whole distribution (`top_p` 1).

    Args:
        rollout, old: as in `rollout_gap`.
    """
    pairs = zip(rollout, old, strict=True)
    return float(torch.stack([k3(theirs.double() - sampled.double()).sum() for sampled, theirs in pairs]).mean())
