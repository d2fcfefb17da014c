"""The reference model's slow pursuit of the policy (paper: reference <- 0.9 policy + 0.1 reference)."""

from __future__ import annotations

import torch

from megatron_rlt.models.language_model import LanguageModel


@torch.no_grad()
def mix_into_reference(reference: LanguageModel, policy: LanguageModel, *, policy_share: float) -> None:
    """Set the reference to `policy_share * policy + (1 - policy_share) * reference`, computed in fp32.

    Both have the same layout, so every rank mixes its own shards.
    """
    with reference.on_device(changes=True):
        _mix(reference, policy, policy_share)


def _mix(reference: LanguageModel, policy: LanguageModel, policy_share: float) -> None:
    for (name, target), (policy_name, source) in zip(
        reference.named_parameters(), policy.named_parameters(), strict=True
    ):
        assert name == policy_name, f"reference and policy differ in their parameters: {name} against {policy_name}"
        target.copy_(torch.lerp(target.float(), source.float(), policy_share))
