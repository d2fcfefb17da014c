"""What every RL job builds around the model it trains: the optimizer's side, the sampling side."""

from __future__ import annotations

from megatron_rlt.config.jobs import RlConfig
from megatron_rlt.config.plan import num_updates
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.engine import MegatronEngine
from megatron_rlt.rollout.requests import StopCondition
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
    config: RlConfig,
    model: LanguageModel,
    layout: Layout,
    *,
    temperature: float,
    num_token_ids: int,
    stop: StopCondition,
    on_progress: OnProgress,
) -> MegatronEngine:
    """The engine that samples from the policy's own shards."""
    return MegatronEngine(
        model,
        layout,
        temperature=temperature,
        top_p=config.rollout.top_p,
        greedy=False,
        num_token_ids=num_token_ids,
        max_completion_tokens=config.rollout.max_completion_tokens,
        max_batch_size=config.rollout.max_batch_size,
        max_prefill_tokens=config.rollout.max_prefill_tokens,
        stop=stop,
        on_progress=on_progress,
    )
