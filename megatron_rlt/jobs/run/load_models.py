"""Puts a configured model on this rank: Hugging Face folder in, this rank's shards in its layout out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.sections import GrpoConfig, ModelConfig
from megatron_rlt.metrics.memory import Holdings
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.requests import SamplingEngine

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(config: ModelConfig, layout: Layout) -> LanguageModel:
    """A model with its weights. Collective over the layout; raises ValueError if folder and architecture disagree."""
    architecture = Architecture.from_folder(config.model)
    model = build_model(architecture, layout, dtype=_DTYPES[config.dtype], recompute=config.recompute)
    model.to(device())
    load_hf_weights(model, architecture, config.model, layout)
    return model


def load_frozen_model(config: ModelConfig, layout: Layout) -> LanguageModel:
    """A model that is asked but never trained. Between turns it is where `residency` says."""
    model = load_model(config, layout)
    model.requires_grad_(False)
    model.eval()
    if config.residency == "host":
        model.live_on_host()
    return model


def load_reference(policy: ModelConfig, grpo: GrpoConfig, layout: Layout) -> LanguageModel | None:
    """The policy's start, frozen, in the policy's layout; None where the loss does not ask it."""
    if grpo.beta == 0:
        return None
    return load_frozen_model(policy.model_copy(update={"residency": grpo.reference_residency}), layout)


# What a training job's models, optimizer and caches hold on this rank: the memory ledger's answer.
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
