"""What a training job's models, optimizer and caches hold on this rank: the memory ledger's answer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlt.metrics.memory import Holdings
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.requests import SamplingEngine


def take_holdings(policy: Policy, frozen: Sequence[LanguageModel], engine: SamplingEngine | None) -> Holdings:
    """Bytes by kind, at most since the last call.

    Args:
        frozen: the models beside the policy.
        engine: None where nothing is sampled.
    """
    models = (policy.model, *frozen)
    return Holdings(
        weights=sum(model.weight_bytes for model in models),
        visiting_weights=sum(model.take_visiting_bytes() for model in models),
        host_weights=sum(model.host_weight_bytes for model in models),
        gradients=policy.gradient_bytes,
        optimizer=policy.optimizer_bytes,
        caches=0 if engine is None else engine.take_peak_cache_bytes(),
    )
