"""What every RL job builds around the model it trains: the optimizer's side, the sampling side."""

from __future__ import annotations

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.jobs.rl.learner import Learner
from megatron_rlt.jobs.rl.mismatch import Decode, MismatchWatch
from megatron_rlt.jobs.run.load_models import load_reference
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy
from megatron_rlt.rollout.megatron.engine import MegatronEngine
from megatron_rlt.rollout.requests import KnownStopCondition, SamplingEngine
from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import OnProgress


def build_learner(
    config: RlConfig, policy: ModelConfig, old_policy: LogprobEngine, decode: Decode, on_progress: OnProgress
) -> Learner:
    """The policy with optimizer, schedule, reference and mismatch watch. Collective.

    `policy`: section of the model that is trained; `old_policy`: its engine; `decode`: writes ids as text, for people.
    """
    reference = load_reference(policy, config.grpo, old_policy.model.layout)
    return Learner(
        policy=Policy(
            old_policy.model,
            optimizer=config.optimizer,
            blocks=config.scoring,
            temperature=config.temperature,
            max_tokens_per_pack=config.grpo.max_tokens_per_pack,
            micro_batch_size=config.grpo.micro_batch_size,
            num_updates=config.num_updates,
            on_progress=on_progress,
        ),
        old_policy=old_policy,
        reference=None
        if reference is None
        else LogprobEngine(reference, temperature=config.temperature, scoring=config.scoring, on_progress=on_progress),
        mismatch=MismatchWatch.of_run(config.mismatch, config.output_dir, decode, temperature=config.temperature),
        grpo=config.grpo,
        max_completion_tokens=config.rollout.max_completion_tokens,
    )


def sampling_engine(
    config: RlConfig | CollectConfig,
    policy: ModelConfig,
    model: LanguageModel,
    *,
    num_token_ids: int,
    stop: KnownStopCondition,
    on_progress: OnProgress,
) -> SamplingEngine:
    """The engine that continues prompts with the weights of `policy`, by ids below `num_token_ids`. Collective.

    Raises:
        ValueError: vLLM refuses the model, or a server at an address serves another.
        StoppedError: a vLLM server does not start or does not answer.
    """
    rollout = config.rollout
    if rollout.engine == "vllm":
        from megatron_rlt.jobs.rl.vllm import vllm_engine  # here: what it imports would slow every other start

        vocab_size = model.unpadded_vocab_size
        sampling = Sampling(
            config.temperature, rollout.top_p, num_token_ids, vocab_size, rollout.max_completion_tokens, stop
        )
        return vllm_engine(config, policy, model, sampling, on_progress)
    return MegatronEngine(
        model,
        temperature=config.temperature,
        top_p=rollout.top_p,
        greedy=False,
        num_token_ids=num_token_ids,
        max_completion_tokens=rollout.max_completion_tokens,
        max_batch_size=rollout.max_batch_size,
        max_prefill_tokens=rollout.max_prefill_tokens,
        stop=stop,
        on_progress=on_progress,
    )
