"""Builds vLLM as sampling engine, with the weight sync that keeps it at the policy: in these ranks, or as servers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.rollout.requests import SamplingEngine
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.colocated import ColocatedEngine
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.server_engine import ServerEngine
from megatron_rlt.rollout.vllm.servers import VllmServers
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.transfer.direct import weight_transport
from megatron_rlt.rollout.weight_sync.sync import Receiver, WeightSync
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress, Span, SpannedSequence, StoppedError

# Largest difference in one token's log-prob that the rounding of two programs explains, in nats (about 1e-5 and 0.1
# were measured).
_PROBE_GAPS = {"float32": 1e-3, "bfloat16": 0.5}


def vllm_engine(
    config: RlConfig | CollectConfig,
    policy: ModelConfig,
    model: LanguageModel,
    sampling: Sampling,
    on_progress: OnProgress,
) -> SamplingEngine:
    """vLLM in the configured placement. Collective; raises as `sampling_engine`."""
    settings, shape = config.rollout.vllm, engine_shape(config, policy, model.architecture)
    sync = partial(_weight_sync, config, policy, model, sampling.num_token_ids, on_progress)
    if settings.placement == "colocated":
        copy = VllmModel(shape)
        return ColocatedEngine(copy, sync(copy), model.architecture, sampling, on_progress=on_progress)
    transport = weight_transport(shape, config.output_dir, on_progress)
    try:
        servers = VllmServers(
            shape, sampling, transport, log_folder=config.output_dir / "vllm", on_progress=on_progress
        )
    except EngineLostError as error:
        raise StoppedError(f"rollout.vllm.server: {error}") from error
    return ServerEngine(servers, sync(servers), model.architecture, max_restarts=settings.server.max_retries)


def engine_shape(config: RlConfig | CollectConfig, policy: ModelConfig, architecture: Architecture) -> EngineShape:
    """The engine that holds the policy, whichever process it runs in."""
    rollout, settings = config.rollout, config.rollout.vllm
    return EngineShape(
        policy.model,
        policy.dtype,
        policy.layout.tp if settings.tp is None else settings.tp,
        # To return the log-probs of a whole sequence, vLLM needs room for one more token.
        max_tokens=min(
            config.prompts.max_prompt_tokens + rollout.max_completion_tokens + 1, position_limit(architecture)
        ),
        max_batch_size=rollout.max_batch_size,
        max_prefill_tokens=rollout.max_prefill_tokens,
        settings=settings,
        on_gpu=torch.cuda.is_available(),
    )


def _weight_sync(
    config: RlConfig | CollectConfig,
    policy: ModelConfig,
    model: LanguageModel,
    num_token_ids: int,
    on_progress: OnProgress,
    receiver: Receiver,
) -> WeightSync:
    # Engines answer for prompts at temperature 1, whatever they sample at.
    trainer = LogprobEngine(model, temperature=1.0, scoring=config.scoring, on_progress=on_progress)

    def trainer_logprobs(ids: Tensor) -> Tensor:
        return trainer.logprobs([SpannedSequence(ids, (Span(1, len(ids)),))]).values[0]

    allowed = config.rollout.vllm.max_probe_gap
    return WeightSync(
        model,
        receiver,
        trainer_logprobs=trainer_logprobs,
        num_token_ids=num_token_ids,
        max_probe_gap=_PROBE_GAPS[policy.dtype] if allowed is None else allowed,
    )
