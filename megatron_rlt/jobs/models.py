"""Puts a configured model on this rank: Hugging Face folder in, this rank's shards in its layout out."""

from __future__ import annotations

import torch

from megatron_rlt.config.sections import GrpoConfig, ModelConfig
from megatron_rlt.models.architecture import Architecture
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device

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
