"""A step's numbers and its rows for the completion store, from records that every rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import torch

from megatron_rlt.algorithm.advantages import advantage_variance_shares
from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.rl.grpo import update_metrics
from megatron_rlt.jobs.rl.mismatch import logprob_metrics
from megatron_rlt.jobs.train.step import StepResult
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.rewards.rlt import reward_terms, why_invalid
from megatron_rlt.store.completions import CompletionRow
from megatron_rlt.types import FormatFlag, LeakMetrics, RewardParts

_PARTS = ("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty")


_LEAKS = fields(LeakMetrics)


def step_metrics(result: StepResult, grpo: GrpoConfig, *, lambda_kl: float) -> dict[str, float]:
    """Everything worth a curve, over the completions of all ranks. Means of rewards leave dropped completions out."""
    kept = [parts for parts in result.rewards if parts.valid]
    metrics = {name: Tally.of(getattr(parts, name) for parts in kept).mean for name in _PARTS}
    metrics |= _rewards_by_student(result)
    metrics |= {f"dropped/{reason}": float(count) for reason, count in _dropped(result.rewards).items()}
    metrics["dropped_completions"] = float(len(result.rewards) - len(kept))
    metrics["advantage_std"] = float(result.advantages.std())
    metrics |= _variance_shares(result, grpo, lambda_kl=lambda_kl)
    metrics |= {field.name: Tally.of(vars(leak)[field.name] for leak in result.leaks).mean for field in _LEAKS}
    metrics |= _form(result) | logprob_metrics(result.old_policy, result.mismatch)
    return metrics | update_metrics(result.updates)


def completion_rows(result: StepResult, *, step: int) -> list[CompletionRow]:
    """One row a completion, in the order they were sampled; `step` counts from 1."""
    rows: list[CompletionRow] = []
    for question, group in enumerate(result.groups):
        for member, completion in enumerate(group.completions):
            index = len(rows)
            rows.append(
                CompletionRow.of(
                    group.prompt,
                    completion,
                    result.pairs[index],
                    result.rewards[index],
                    result.leaks[index],
                    step=step,
                    question_index=question,
                    completion_index=member,
                    advantage=float(result.advantages[index]),
                    rewards_by_student={name: theirs[index].reward for name, theirs in result.by_student.items()},
                    old_logprobs=result.old_policy.values[index],
                )
            )
    return rows


def _dropped(rewards: Sequence[RewardParts]) -> Counter[str]:
    return Counter(reason for parts in rewards if (reason := why_invalid(parts)) is not None)


def _rewards_by_student(result: StepResult) -> dict[str, float]:
    """Each student's mean reward, a held-out one's too; nothing where there is only one."""
    if len(result.by_student) == 1:
        return {}
    return {
        f"reward/{name}": Tally.of(parts.reward for parts in rewards if parts.valid).mean
        for name, rewards in result.by_student.items()
    }


def _variance_shares(result: StepResult, grpo: GrpoConfig, *, lambda_kl: float) -> dict[str, float]:
    shares = advantage_variance_shares(
        reward_terms(result.rewards, lambda_kl=lambda_kl),
        torch.arange(len(result.rewards)) // grpo.group_size,
        torch.tensor([parts.valid for parts in result.rewards]),
        normalize_std=grpo.normalize_std,
        std_epsilon=grpo.std_epsilon,
    )
    return {f"advantage_share/{name}": share for name, share in shares.items()}


def _form(result: StepResult) -> dict[str, float]:
    count = len(result.pairs)
    flags = Counter(flag for pair in result.pairs for flag in pair.flags)
    metrics = {f"flag_share/{flag.value}": flags[flag] / count for flag in FormatFlag}
    lengths = Tally.of(len(completion.token_ids) for completion in result.completions)
    metrics["completion_tokens"], metrics["completion_tokens_max"] = lengths.mean, lengths.maximum
    metrics["explanation_tokens"] = Tally.of(pair.num_explanation_tokens for pair in result.pairs).mean
    metrics["prompt_tokens"] = Tally.of(len(group.prompt.token_ids) for group in result.groups).mean
    metrics["well_formed_share"] = sum(pair.well_formed for pair in result.pairs) / count
    return metrics
