"""What every RL job shares: sampling groups, comparing within them, and the update (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import group_advantages
from megatron_rlt.algorithm.policy_loss import LossSums, policy_loss
from megatron_rlt.algorithm.token_weights import constant_token_weights, token_weights, without_truncated
from megatron_rlt.config.training import GrpoConfig
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.policy.policy import Policy, Update
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.types import Completion, Prompt, RolloutGroup, ScoredCompletion

C = TypeVar("C", bound=ScoredCompletion)


@dataclass(frozen=True)
class SeedSource:
    """Where a batch stands in a run; its completions' seeds follow, so that a resumed run samples the same."""

    run_seed: int
    step: int  # from 0
    first_question: int  # within the step: later rounds of one step continue the count


def sample_groups(
    engine: SamplingEngine, prompts: Sequence[Prompt], seeds: SeedSource, *, group_size: int, policy_version: int
) -> tuple[RolloutGroup, ...]:
    """`group_size` completions of every prompt. Collective."""
    requests = group_requests(prompts, seeds, group_size=group_size)
    return groups_of(prompts, engine.generate(requests, policy_version=policy_version))


def group_requests(prompts: Sequence[Prompt], seeds: SeedSource, *, group_size: int) -> list[SampleRequest]:
    """The requests of a batch: the members of a group one after another."""
    return [
        SampleRequest(
            prompt.token_ids, completion_seed(seeds.run_seed, seeds.step, seeds.first_question + question, member)
        )
        for question, prompt in enumerate(prompts)
        for member in range(group_size)
    ]


def groups_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> tuple[RolloutGroup, ...]:
    """An engine's answer to `group_requests`, equally many completions per prompt."""
    size, rest = divmod(len(completions), len(prompts))
    assert rest == 0, "groups have one size"
    return tuple(
        RolloutGroup(prompt, tuple(completions[size * question : size * (question + 1)]))
        for question, prompt in enumerate(prompts)
    )


def rollout_work(engine: SamplingEngine, groups: Sequence[RolloutGroup]) -> tuple[int, float]:
    """Tokens sampled, and the model FLOP this takes."""
    completions = [completion for group in groups for completion in group.completions]
    prompts = [group.prompt.token_ids for group in groups for _ in group.completions]
    return sum(len(completion.token_ids) for completion in completions), engine.model_flops(prompts, completions)


def compute_advantages(completions: Sequence[C], grpo: GrpoConfig, *, smallest_spread: float) -> tuple[C, ...]:
    """The completions with their advantages: how much better each is than the others of its question.

    `smallest_spread`: standard deviation of rewards below which a group's differences count as noise.
    """
    rewards = torch.tensor([one.reward for one in completions], dtype=torch.float64)
    advantages = torch.cat(
        [
            group_advantages(
                group,
                ~group.isnan(),
                normalize_std=grpo.normalize_std,
                std_epsilon=grpo.std_epsilon,
                smallest_spread=smallest_spread,
            )
            for group in torch.split(rewards, grpo.group_size)
        ]
    )
    return tuple(replace(one, advantage=value) for one, value in zip(completions, advantages.tolist(), strict=True))


def update_policy(
    policy: Policy, completions: Sequence[ScoredCompletion], grpo: GrpoConfig, *, max_completion_tokens: int
) -> tuple[Update[Tensor], ...]:
    """One or several optimizer steps, each on an equal part of the groups with its own denominator. Collective.

    Returns one record per optimizer step; its records are `LossSums` as vectors.
    """
    size = len(completions) // grpo.updates_per_batch
    return tuple(
        _update_on(policy, completions[start : start + size], grpo, max_completion_tokens)
        for start in range(0, len(completions), size)
    )


def update_metrics(updates: Sequence[Update[Tensor]]) -> dict[str, float]:
    """Loss, ratio, clip share, KL and gradient of all of a step's updates together."""
    parts = [LossSums.from_vector(record) for update in updates for record in update.records]
    sums = LossSums.total(parts, torch.device("cpu"))
    num_tokens = max(float(sums.num_tokens), 1.0)  # 0 only if every completion was dropped
    return {
        "loss": float(sums.loss) / len(updates),
        "ratio_mean": float(sums.token_ratio) / num_tokens,
        "clip_share": float(sums.token_clipped) / num_tokens,
        "kl_to_reference": float(sums.token_kl) / num_tokens,
        "grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "lr": updates[-1].lr,
        "skipped_updates": float(sum(update.skipped for update in updates)),
    }


def _update_on(
    policy: Policy, completions: Sequence[ScoredCompletion], grpo: GrpoConfig, max_completion_tokens: int
) -> Update[Tensor]:
    weights = _token_weight_rows(completions, grpo, max_completion_tokens)
    advantages = [torch.tensor(one.advantage, dtype=torch.float64).expand(len(one.old_logprobs)) for one in completions]
    old = _rows(completions, lambda one: one.old_logprobs)
    reference = _rows(completions, lambda one: one.reference_logprobs)
    importance = _rows(completions, lambda one: one.correction.importance)

    def loss(packed: PackedBatch, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, Tensor]:
        def rows(values: Sequence[Tensor] | None) -> Tensor | None:
            return None if values is None else packed.join(values).to(logprobs.device)

        scalar, sums = policy_loss(
            logprobs,
            # One update per batch is strictly on-policy: its ratio is 1 and needs no earlier log-probs.
            old_logprobs=None if grpo.updates_per_batch == 1 else rows(old),
            reference_logprobs=rows(reference),
            advantages=packed.join(advantages).to(logprobs.device),
            weights=packed.join(weights).to(logprobs.device),
            importance=rows(importance),
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            beta=grpo.beta,
        )
        return scalar, sums.to_vector().cpu()

    nothing_counts = not any(bool(row.any()) for row in weights)
    return policy.update([one.sequence for one in completions], loss, nothing_counts=nothing_counts)


def _rows(
    completions: Sequence[ScoredCompletion], values: Callable[[ScoredCompletion], Tensor | None]
) -> list[Tensor] | None:
    """One `[C_i]` tensor per completion; None where the completions have none."""
    found = [value for one in completions if (value := values(one)) is not None]
    assert len(found) in (0, len(completions)), "a step gives a value to every completion or to none"
    return found or None


def _token_weight_rows(
    completions: Sequence[ScoredCompletion], grpo: GrpoConfig, max_completion_tokens: int
) -> list[Tensor]:
    """`[C_i]` each: the weight of every token in the loss."""
    lengths = [len(one.old_logprobs) for one in completions]
    counted = torch.tensor([one.reward == one.reward and one.correction.kept for one in completions])
    if grpo.mask_truncated:
        counted = without_truncated(counted, [one.truncated for one in completions])
    if grpo.aggregation == "constant":
        weights = constant_token_weights(lengths, counted.tolist(), max_completion_tokens=max_completion_tokens)
    else:
        weights = token_weights(lengths, counted.tolist(), aggregation=grpo.aggregation)
    rows = [weight.expand(length) for weight, length in zip(weights, lengths, strict=True)]
    # A masked token takes no part, while the denominators stay as they were.
    masks = [one.correction.token_kept for one in completions]
    return [row if mask is None else row * mask for row, mask in zip(rows, masks, strict=True)]
