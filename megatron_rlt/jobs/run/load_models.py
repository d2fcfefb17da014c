"""Loads configured models: this rank's shards, in the model's layout, from a folder of any kind."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlt.config.folders.description import describe_model
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.training import GrpoConfig
from megatron_rlt.metrics.memory import MemoryUsage
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_weights
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.requests import SamplingEngine

logger = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(config: ModelConfig, layout: Layout) -> LanguageModel:
    """Load a model. Collective over the layout; raises ValueError if folder and architecture disagree."""
    described = describe_model(config.model)
    if config.fp8 is not None and config.fp8.recipe == "tensorwise" and config.fp8.activations and dist.get_rank() == 0:
        logger.warning("%s: with recipe tensorwise a score depends on its pack and on the layout", config.model)
    model = build_model(
        described.architecture, layout, dtype=_DTYPES[config.dtype], recompute=config.recompute, fp8=config.fp8
    )
    if config.fp8 is None:
        model.to(device())  # FP8 layers are built where they run
    load_weights(model, described)
    return model


def load_frozen_model(config: ModelConfig, layout: Layout) -> LanguageModel:
    """Load a model for inference only; it is offloaded while unused if configured."""
    model = load_model(config, layout)
    model.requires_grad_(False)
    model.eval()
    if config.offload:
        model.offload()
    return model


def load_reference(policy: ModelConfig, grpo: GrpoConfig, layout: Layout) -> LanguageModel | None:
    """Load the frozen initial policy in the policy's layout; None if the loss needs no reference."""
    if grpo.reference is None:
        return None
    return load_frozen_model(policy.model_copy(update={"offload": grpo.reference.offload}), layout)


def memory_usage(policy: Policy, frozen: Sequence[LanguageModel | None], engine: SamplingEngine | None) -> MemoryUsage:
    """Peak bytes on this rank by category since the last call.

    `frozen` lists the models beside the policy (None entries are skipped); `engine` is None if nothing is sampled.
    """
    models = (policy.model, *(model for model in frozen if model is not None))
    return MemoryUsage(
        weights=sum(model.weight_bytes for model in models),
        onloaded_weights=sum(model.take_onloaded_bytes() for model in models),
        host_weights=sum(model.host_weight_bytes for model in models),
        gradients=policy.gradient_bytes,
        optimizer=policy.optimizer_bytes,
        caches=0 if engine is None else engine.take_peak_cache_bytes(),
    )
