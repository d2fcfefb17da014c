"""Exponential moving average of the policy's weights as the reference (paper: 0.9 policy + 0.1 reference)."""

from __future__ import annotations

import torch

from megatron_rlt.models.language_model import LanguageModel


@torch.no_grad()
def update_reference_ema(reference: LanguageModel, policy: LanguageModel, *, policy_share: float) -> None:
    """Set the reference to `policy_share * policy + (1 - policy_share) * reference`, computed in fp32.

    Both have the same layout, so every rank mixes its own shards.
    """
    with reference.onloaded(changes=True):
        pairs = zip(reference.named_parameters(), policy.named_parameters(), strict=True)
        for (name, target), (policy_name, source) in pairs:
            assert name == policy_name, f"reference and policy differ in their parameters: {name} against {policy_name}"
            target.copy_(torch.lerp(target.float(), source.float(), policy_share))
