"""Rollout correction (TIS): importance weights and masks for differences between sampling engine and trainer.

Inputs are log-ratios `old - rollout` of every sampled token; the weights enter the loss as constants. The trainer's
gradient is an expectation under its own policy, but the tokens were sampled from the engine's.

Sources: truncation (Ionides 2008, "Truncated Importance Sampling"), used between engine and trainer by Yao et al. 2025
("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"); token masks as in IcePop (Ling team 2025);
sequence masks by the geometric mean of token ratios as in GSPO (arXiv 2507.18071), independent of the length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.policy_loss import k3


def token_importance(log_ratios: Sequence[Tensor], *, cap: float) -> tuple[Tensor, ...]:
    """Weights per token: `min(exp(old_t - rollout_t), cap)`, `[C_i]` float64 each.

    Biased, since the preceding tokens are not weighted, but bounded by `cap` (C of the source, > 0; usually 2).
    """
    return tuple(ratio.double().exp().clamp(max=cap) for ratio in log_ratios)


def sequence_importance(log_ratios: Sequence[Tensor], *, cap: float) -> tuple[Tensor, ...]:
    """Weights per completion, at each of its tokens: `min(exp(sum_t (old_t - rollout_t)), cap)`, `[C_i]` float64 each.

    Unbiased below the cap; the variance grows with the length.
    """
    return tuple(ratio.double().sum().exp().clamp(max=cap).expand(len(ratio)) for ratio in log_ratios)


def tokens_within(log_ratios: Sequence[Tensor], *, low: float | None, high: float | None) -> tuple[Tensor, ...]:
    """`[C_i]` bool each: tokens with `low <= exp(old - rollout) <= high` (None: no bound); a NaN is outside."""
    return tuple(_within(ratio.double().exp(), low, high) for ratio in log_ratios)


def sequences_within(log_ratios: Sequence[Tensor], *, low: float | None, high: float | None) -> Tensor:
    """`[N]` bool: completions with `low <= exp(mean_t (old_t - rollout_t)) <= high` (None: no bound).

    A completion without tokens is within the bounds.
    """
    means = [ratio.double().mean() if len(ratio) else torch.zeros((), dtype=torch.float64) for ratio in log_ratios]
    return _within(torch.stack(means).exp(), low, high)


def _within(ratios: Tensor, low: float | None, high: float | None) -> Tensor:
    return (ratios >= (0.0 if low is None else low)) & (ratios <= (float("inf") if high is None else high))


_HIGH_SHARE = 0.99


@dataclass(frozen=True)
class RolloutGap:
    """`|rollout - old|` of all tokens of a step in nats, and the resulting divergence. Propagates NaN."""

    mean: float
    p99: float  # at least 99 % of the tokens have at most this (nearest rank)
    maximum: float
    sequence_kl: float  # nats per completion, see `sequence_kl`
    worst_completion: int  # index of the completion with the maximum
    worst_token: int  # index in that completion


def rollout_gap(rollout: Sequence[Tensor], old: Sequence[Tensor]) -> RolloutGap:
    """Compare log-probs by sampling engine and trainer before the update, `[C_i]` each; at least one token in all."""
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
    """Nearest-rank quantile of `[T]` values; `torch.quantile` takes at most 16 million, and a step may have more."""
    return float(values.kthvalue(math.ceil(share * len(values))).values)


def sequence_kl(rollout: Sequence[Tensor], old: Sequence[Tensor]) -> float:
    """KL(engine || trainer) of whole completions in nats, estimated from the engine's samples; arguments as above.

    The estimator is `mean_i sum_t (exp(x_it) - 1 - x_it)` with `x = old - rollout`: k3 (Schulman 2020, "Approximating
    KL Divergence") summed over tokens. By the chain rule the sequence KL is the expected sum of next-token KLs, and k3
    is unbiased for each, so the sum is unbiased and never negative. k3 of the whole sequence's ratio is unbiased too,
    but its variance grows exponentially with the length. Requires sampling from the whole distribution (`top_p` 1).
    """
    pairs = zip(rollout, old, strict=True)
    return float(torch.stack([k3(theirs.double() - sampled.double()).sum() for sampled, theirs in pairs]).mean())
