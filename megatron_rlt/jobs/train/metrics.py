"""A step's numbers, from records that every rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from megatron_rlt.algorithm.advantages import advantage_variance_shares
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.config.training import GrpoConfig
from megatron_rlt.jobs.rl.learner import LearnedStep
from megatron_rlt.jobs.train.engines import TrainContext
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.rewards.rlt import contribution
from megatron_rlt.rewards.terms import LABELS, TERMS
from megatron_rlt.types import FormatFlag, Reward, ScoredExplanation


def step_metrics(
    result: LearnedStep[ScoredExplanation], context: TrainContext, reward: RewardConfig
) -> dict[str, float]:
    """Everything worth a curve, over the completions of all ranks. Means of rewards leave dropped completions out."""
    completions, learner = result.completions, context.learner
    rewards = torch.tensor([one.reward for one in completions], dtype=torch.float64)
    below = [context.noise_floor.is_below(group) for group in torch.split(rewards, learner.grpo.group_size)]
    kept = [one.combined for one in completions if one.combined.dropped is None]
    dropped = Counter(one.combined.dropped for one in completions if one.combined.dropped is not None)
    return {
        "reward": Tally.of(one.total for one in kept).mean,
        **{name: Tally.of(one.terms[name] for one in kept).mean for name in LABELS},
        **_rewards_by_student(completions),
        **{f"dropped/{reason}": float(count) for reason, count in dropped.items()},
        "dropped_completions": float(dropped.total()),
        **context.noise_floor.metrics(num_below=sum(below)),
        **_variance_shares(completions, below, learner.grpo, reward),
        **{name: Tally.of(vars(one.leaks)[name] for one in completions).mean for name in vars(completions[0].leaks)},
        **_form(completions),
        **learner.metrics(result),
    }


def _rewards_by_student(completions: Sequence[ScoredExplanation]) -> dict[str, float]:
    """Each student's mean reward, a held-out one's too; nothing where there is only one."""
    names = completions[0].rewards
    if len(names) == 1:
        return {}
    rewards: dict[str, list[Reward]] = {name: [one.rewards[name] for one in completions] for name in names}
    return {
        f"reward/{name}": Tally.of(one.total for one in theirs if one.dropped is None).mean
        for name, theirs in rewards.items()
    }


def _variance_shares(
    completions: Sequence[ScoredExplanation], below: Sequence[bool], grpo: GrpoConfig, reward: RewardConfig
) -> dict[str, float]:
    """Shares of the terms in the advantages; groups below the noise floor have none."""
    shares = advantage_variance_shares(
        {
            term.name: torch.tensor(
                [contribution(term, one.combined.terms, reward) for one in completions], dtype=torch.float64
            )
            for term in TERMS
        },
        torch.tensor([one.question_index for one in completions]),
        torch.tensor([one.combined.dropped is None and not below[one.question_index] for one in completions]),
        normalize_std=grpo.normalize_std,
        std_epsilon=grpo.std_epsilon,
    )
    return {f"advantage_share/{name}": share for name, share in shares.items()}


def _form(completions: Sequence[ScoredExplanation]) -> dict[str, float]:
    count = len(completions)
    flags = Counter(flag for one in completions for flag in one.pair.flags)
    lengths = Tally.of(len(one.completion.token_ids) for one in completions)
    prompts = {one.question_index: len(one.prompt.token_ids) for one in completions}
    return {
        **{f"flag_share/{flag.value}": flags[flag] / count for flag in FormatFlag},
        "completion_tokens": lengths.mean,
        "completion_tokens_max": lengths.maximum,
        "explanation_tokens": Tally.of(one.pair.num_explanation_tokens for one in completions).mean,
        "prompt_tokens": Tally.of(prompts.values()).mean,
        "well_formed_share": sum(one.pair.well_formed for one in completions) / count,
    }
