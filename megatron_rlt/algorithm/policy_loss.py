"""The clipped policy-gradient loss with a KL penalty to the reference, as a plain sum over tokens.

Loss and metrics are sums with global denominators: summing them over micro-batches and ranks gives the values of the
whole update, however the batch is split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossSums:
    """Sums over tokens that add up over micro-batches and ranks; each a detached float64 scalar."""

    loss: Tensor  # weighted: the loss itself
    policy: Tensor  # weighted: its policy-gradient part
    kl: Tensor  # weighted: k3 KL to the reference, before beta
    weight: Tensor  # 1 for a whole update with at least one valid completion, less what masked tokens had
    num_tokens: Tensor  # tokens that count
    token_ratio: Tensor  # unweighted sum of ratios; over num_tokens: the mean ratio
    token_clipped: Tensor  # tokens whose gradient the clipping removed; over num_tokens: the clip share
    token_kl: Tensor  # unweighted k3 KL to the reference

    @staticmethod
    def from_vector(vector: Tensor) -> LossSums:
        """Inverse of `to_vector`."""
        return LossSums(*vector.unbind())

    def to_vector(self) -> Tensor:
        """`[8]` float64, for one all-reduce over ranks."""
        weighted = [self.loss, self.policy, self.kl, self.weight]
        return torch.stack([*weighted, self.num_tokens, self.token_ratio, self.token_clipped, self.token_kl])

    @staticmethod
    def total(parts: Iterable[LossSums], device: torch.device) -> LossSums:
        """Sum over micro-batches; zeros for none."""
        vectors = [part.to_vector() for part in parts]
        zero = torch.zeros(len(fields(LossSums)), dtype=torch.float64, device=device)
        return LossSums.from_vector(torch.stack([zero, *vectors]).sum(0))


def policy_loss(
    new_logprobs: Tensor,
    *,
    old_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    importance: Tensor | None,
    clip_low: float | None,
    clip_high: float | None,
    beta: float,
) -> tuple[Tensor, LossSums]:
    """`sum_t w_t * (-c_t min(ratio_t A_t, clip(ratio_t) A_t) + beta * k3_t)` of one micro-batch.

    k3 estimates KL(policy || reference) from the policy's samples: exp(x) - 1 - x with x = reference - new.
    Tokens of weight 0 are ignored.

    Args:
        new_logprobs: `[R]` of the sampled tokens under the policy being updated; carries the gradient.
        old_logprobs: `[R]` before the update; None at a batch's only update: the ratio is then 1 with new's gradient.
        reference_logprobs: `[R]`; None (only with beta 0) omits the KL.
        advantages: `[R]`, the completion's advantage, repeated per token.
        weights: `[R]` from `token_weights`.
        importance: `[R]` constants c_t from `rollout_mismatch`; None: 1 everywhere.
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`; None: no bound.
        beta: weight of the KL.

    Returns:
        The loss (scalar, float32) and the sums for the metrics.
    """
    assert beta == 0 or reference_logprobs is not None, "beta > 0 needs the reference's log-probs"
    counted = weights > 0
    new, advantage, weight = new_logprobs[counted].float(), advantages[counted].float(), weights[counted].float()
    old = new.detach() if old_logprobs is None else old_logprobs[counted].float()
    ratio = torch.exp(new - old)
    lowest, highest = 0.0 if clip_low is None else 1.0 - clip_low, torch.inf if clip_high is None else 1.0 + clip_high
    clipped_ratio = ratio.clamp(lowest, highest)
    policy = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
    if importance is not None:
        policy = importance[counted].float() * policy
    kl = torch.zeros_like(new) if reference_logprobs is None else k3(reference_logprobs[counted].float() - new)
    loss = (weight * (policy + beta * kl)).sum()
    sums = LossSums(
        loss=_sum(weight * (policy + beta * kl)),
        policy=_sum(weight * policy),
        kl=_sum(weight * kl),
        weight=_sum(weight),
        num_tokens=_sum(counted),
        token_ratio=_sum(ratio),
        token_clipped=_sum(clipped_ratio * advantage < ratio * advantage),
        token_kl=_sum(kl),
    )
    return loss, sums


def k3(gap: Tensor) -> Tensor:
    """`exp(x) - 1 - x`, elementwise: never negative (Schulman 2020, "Approximating KL Divergence")."""
    return torch.expm1(gap) - gap


def _sum(values: Tensor) -> Tensor:
    return values.detach().double().sum()
