"""Which completions and tokens of a step an update learns from, and how much, given how the engine rated them.

In: the settings and both log-probs. Out: a `Correction`, the same on every rank, and its metrics. The formulas are
`algorithm/rollout_correction.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.rollout_correction import (
    sequence_importance,
    sequences_within,
    token_importance,
    tokens_within,
)
from megatron_rlt.config.mismatch import MismatchConfig


@dataclass(frozen=True, eq=False)
class Correction:
    """Constants of an update, completion by completion; None: that correction is off, and nothing is multiplied."""

    importance: tuple[Tensor, ...] | None  # [C_i] float64, of the policy's part of the loss
    token_kept: tuple[Tensor, ...] | None  # [C_i] bool
    completion_kept: Tensor | None  # [N] bool
    capped: float | None  # share of tokens whose importance the cap cut

    def metrics(self) -> dict[str, float]:
        """Of the corrections that are on, over all tokens and completions of the step."""
        metrics = {}
        if self.importance is not None and self.capped is not None:
            metrics["rollout_weight_mean"] = float(torch.cat(self.importance).mean())
            metrics["rollout_weight_capped_share"] = self.capped
        if self.token_kept is not None:
            metrics["rollout_masked_tokens"] = float((~torch.cat(self.token_kept)).sum())
        if self.completion_kept is not None:
            metrics["rollout_masked_completions"] = float((~self.completion_kept).sum())
        return metrics


def correction_of(settings: MismatchConfig, rollout: Sequence[Tensor], old: Sequence[Tensor]) -> Correction:
    """What the settings make of a step.

    Args:
        rollout, old: `[C_i]` each, log-probs by the sampling engine and by the trainer before the update.
    """
    log_ratios = [theirs.double() - sampled.double() for sampled, theirs in zip(rollout, old, strict=True)]
    cap = settings.token_weight_cap or settings.sequence_weight_cap
    weigh = sequence_importance if settings.token_weight_cap is None else token_importance
    importance = None if cap is None else weigh(log_ratios, cap=cap)
    return Correction(
        importance=importance,
        token_kept=tokens_within(log_ratios, low=settings.token_ratio_min, high=settings.token_ratio_max)
        if settings.masks_tokens
        else None,
        completion_kept=sequences_within(log_ratios, low=settings.sequence_ratio_min, high=settings.sequence_ratio_max)
        if settings.masks_sequences
        else None,
        capped=None if importance is None or cap is None else float(torch.cat(importance).ge(cap).double().mean()),
    )
