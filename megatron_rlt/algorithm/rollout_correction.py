"""What a policy update does about tokens that the sampling engine rated otherwise than the trainer.

In: log-ratios `old - rollout` of every sampled token. Out: importance weights, which enter the loss as constants, and
who takes part at all. The trainer's gradient is an expectation under its own policy; the tokens came from the engine's.

Sources: truncation (Ionides 2008, "Truncated Importance Sampling"), used between engine and trainer by Yao et al. 2025
("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"); verl's documentation calls weights and masks
"rollout correction", slime's and others' "TIS"; masks of tokens after IcePop (Ling team 2025), of sequences by the
geometric mean of their ratios, which is GSPO's (arXiv 2507.18071) and does not depend on their length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
