"""What a policy update does about tokens that the sampling engine rated otherwise than the trainer.

In: log-ratios `old - rollout` of every sampled token. Out: importance weights, which enter the loss as constants, and
who takes part at all. The trainer's gradient is an expectation under its own policy; the tokens came from the engine's.

Sources: truncation (Ionides 2008, "Truncated Importance Sampling"), used between engine and trainer by Yao et al. 2025
("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"); verl's documentation calls weights and masks
"rollout correction", slime's and others' "TIS"; masks of tokens after IcePop (Ling team 2025), of sequences by the
geometric mean of their ratios, which is GSPO's (arXiv 2507.18071) and does not depend on their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.policy_loss import k3


def token_importance(log_ratios: Sequence[Tensor], *, cap: float) -> tuple[Tensor, ...]:
    """`min(exp(old_t - rollout_t), cap)`: `[C_i]` float64 each, a weight of its own for every token.

    Biased (the tokens before it are not weighted), but no weight is ever above the cap.

    Args:
        log_ratios: `[C_i]` each, old - rollout.
        cap: C of the source, > 0; usually 2.
    """
    return tuple(ratio.double().exp().clamp(max=cap) for ratio in log_ratios)


def sequence_importance(log_ratios: Sequence[Tensor], *, cap: float) -> tuple[Tensor, ...]:
    """`min(exp(sum_t (old_t - rollout_t)), cap)` at every token of a completion: `[C_i]` float64 each.

    The ratio of the whole completion is unbiased where the cap does not act; it strays with the length.
    """
    return tuple(ratio.double().sum().exp().clamp(max=cap).expand(len(ratio)) for ratio in log_ratios)


def tokens_within(log_ratios: Sequence[Tensor], *, low: float | None, high: float | None) -> tuple[Tensor, ...]:
    """`[C_i]` bool each: the tokens with `low <= exp(old - rollout) <= high`; a NaN lies outside.

    Args:
        low, high: bounds of the ratio; None: that side is open.
    """
    return tuple(_within(ratio.double().exp(), low, high) for ratio in log_ratios)


def sequences_within(log_ratios: Sequence[Tensor], *, low: float | None, high: float | None) -> Tensor:
    """`[N]` bool: the completions with `low <= exp(mean_t (old_t - rollout_t)) <= high`; one without tokens is within.

    Args:
        low, high: bounds of the geometric mean of its tokens' ratios; None: that side is open.
    """
    means = [ratio.double().mean() if len(ratio) else torch.zeros((), dtype=torch.float64) for ratio in log_ratios]
    return _within(torch.stack(means).exp(), low, high)


def _within(ratios: Tensor, low: float | None, high: float | None) -> Tensor:
    return (ratios >= (0.0 if low is None else low)) & (ratios <= (float("inf") if high is None else high))


# How far the sampling engine's log-probs are from the trainer's, of the same tokens and the same weights.
#
# In: both log-probs of every completion of a step. Out: the gap in numbers, and which token is worst. Engine and
# trainer
# are two programs: what they disagree about makes on-policy training silently off-policy (Yao et al. 2025, "Your
# Efficient RL Framework Secretly Brings You Off-Policy RL Training").
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
