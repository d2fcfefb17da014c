"""What every RL job builds around the model it trains: the optimizer's side, the sampling side."""

from __future__ import annotations

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.job import RlConfig
from megatron_rlt.config.commands.train import num_updates
from megatron_rlt.config.sections import ModelConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import KnownStopCondition, SamplingEngine
from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.types import OnProgress


def build_policy(
    config: RlConfig, model: LanguageModel, layout: Layout, *, temperature: float, on_progress: OnProgress
) -> Policy:
    """The model with optimizer and schedule. Collective over the layout."""
    return Policy(
        model,
        layout,
        optimizer=config.optimizer,
        blocks=config.scoring,
        temperature=temperature,
        micro_batch_size=config.grpo.micro_batch_size,
        num_updates=num_updates(config),
        on_progress=on_progress,
    )


def sampling_engine(
    config: RlConfig | CollectConfig,
    policy: ModelConfig,
    model: LanguageModel,
    layout: Layout,
    *,
    num_token_ids: int,
    temperature: float,
    stop: KnownStopCondition,
    on_progress: OnProgress,
) -> SamplingEngine:
    """The engine that continues prompts with the policy's weights. Collective.

    Args:
        policy: the section of the model that samples.
        num_token_ids: only ids below it are sampled.

    Raises:
        ValueError: vLLM refuses the model, or a server at an address serves another.
        StoppedError: a vLLM server does not start or does not answer.
    """
    rollout = config.rollout
    if rollout.engine == "vllm":
        from megatron_rlt.jobs.rl.vllm import vllm_engine  # here: what it imports would slow every other start

        vocab_size = model.unpadded_vocab_size
        sampling = Sampling(temperature, rollout.top_p, num_token_ids, vocab_size, rollout.max_completion_tokens, stop)
        return vllm_engine(config, policy, model, layout, sampling, on_progress)
    return MegatronEngine(
        model,
        layout,
        temperature=temperature,
        top_p=rollout.top_p,
        greedy=False,
        num_token_ids=num_token_ids,
        max_completion_tokens=rollout.max_completion_tokens,
        max_batch_size=rollout.max_batch_size,
        max_prefill_tokens=rollout.max_prefill_tokens,
        stop=stop,
        on_progress=on_progress,
    )
