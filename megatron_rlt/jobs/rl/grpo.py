"""What every RL job shares: sampling groups, comparing within them, and the update (GRPO, arXiv 2402.03300).

In: prompts, and later what their completions earned. Out: groups, advantages, a changed policy. It does not know where
rewards come from. Every rank holds the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import group_advantages
from megatron_rlt.algorithm.policy_loss import LossSums, policy_loss
from megatron_rlt.algorithm.token_weights import constant_token_weights, token_weights, without_truncated
from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.rl.mismatch import Correction
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.policy.policy import Policy, Update
from megatron_rlt.policy.reference import mix_into_reference
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.types import Completion, Logprobs, PackedBatch, Prompt, RolloutGroup, SpannedSequence


@dataclass(frozen=True)
class Draw:
    """Where a batch stands in a run; seeds follow from it, so a resumed run samples the same."""

    run_seed: int
    number: int  # of the step, from 0
    first_question: int  # within the step: later rounds of one step continue the count


@dataclass(frozen=True, eq=False)
class UpdateBatch:
    """What the policy learns from, completion by completion, group by group."""

    sequences: tuple[SpannedSequence, ...]  # prompt and completion; one span: the completion
    advantages: Tensor  # [N] float64
    valid: tuple[bool, ...]  # whether a completion has a reward
    truncated: tuple[bool, ...]  # whether the token budget ended it
    old_policy: Logprobs
    correction: Correction  # for what the sampling engine rated otherwise than old_policy
    reference: Logprobs | None


def sample_groups(
    engine: SamplingEngine, prompts: Sequence[Prompt], draw: Draw, *, group_size: int, policy_version: int
) -> tuple[RolloutGroup, ...]:
    """`group_size` completions of every prompt. Collective."""
    requests = group_requests(prompts, draw, group_size=group_size)
    return groups_of(prompts, engine.generate(requests, policy_version=policy_version))


def group_requests(prompts: Sequence[Prompt], draw: Draw, *, group_size: int) -> list[SampleRequest]:
    """What an engine is asked for: the members of a group one after another."""
    return [
        SampleRequest(
            prompt.token_ids, completion_seed(draw.run_seed, draw.number, draw.first_question + question, member)
        )
        for question, prompt in enumerate(prompts)
        for member in range(group_size)
    ]


def groups_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> tuple[RolloutGroup, ...]:
    """An engine's answer to `group_requests`, equally many completions a prompt."""
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


def compare_within_groups(rewards: Tensor, valid: Tensor, grpo: GrpoConfig) -> Tensor:
    """`[N]` advantages: how much better a completion is than the others of its question."""
    return torch.cat(
        [
            group_advantages(group, usable, normalize_std=grpo.normalize_std, std_epsilon=grpo.std_epsilon)
            for group, usable in zip(
                torch.split(rewards, grpo.group_size), torch.split(valid, grpo.group_size), strict=True
            )
        ]
    )


def update_policy(
    policy: Policy, batch: UpdateBatch, grpo: GrpoConfig, *, max_completion_tokens: int
) -> tuple[Update[Tensor], ...]:
    """One or several optimizer steps, each on an equal part of the groups with its own denominator. Collective."""
    size = len(batch.sequences) // grpo.updates_per_batch
    return tuple(
        _update_on(policy, batch, range(start, start + size), grpo, max_completion_tokens)
        for start in range(0, len(batch.sequences), size)
    )


def follow_policy(reference: LanguageModel | None, policy: Policy, grpo: GrpoConfig, number: int) -> None:
    """Every n steps: reference <- mix * policy + (1 - mix) * reference. `number` counts from 0."""
    interval = grpo.reference_sync_steps
    if reference is not None and interval is not None and (number + 1) % interval == 0:
        mix_into_reference(reference, policy.model, policy_share=grpo.reference_mix)


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
    policy: Policy, batch: UpdateBatch, part: range, grpo: GrpoConfig, max_completion_tokens: int
) -> Update[Tensor]:
    sequences = [batch.sequences[index] for index in part]
    lengths = [sequence.num_targets for sequence in sequences]
    weights = _weights(batch, part, lengths, grpo, max_completion_tokens)
    weight_rows = [weight.expand(length) for weight, length in zip(weights, lengths, strict=True)]
    kept, importance = batch.correction.token_kept, batch.correction.importance
    if kept is not None:  # a masked token takes no part, while the denominators stay as they were
        weight_rows = [weight * kept[index] for index, weight in zip(part, weight_rows, strict=True)]
    advantage_rows = [batch.advantages[index].expand(length) for index, length in zip(part, lengths, strict=True)]
    old, reference = batch.old_policy, batch.reference

    def loss(packed: PackedBatch, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, Tensor]:
        def rows(values: Sequence[Tensor]) -> Tensor:
            return packed.join(values).to(logprobs.device)

        # One update a batch is strictly on-policy: its ratio is 1 and needs no earlier log-probs.
        on_policy = grpo.updates_per_batch == 1
        scalar, sums = policy_loss(
            logprobs,
            old_logprobs=None if on_policy else rows([old.values[index] for index in part]),
            reference_logprobs=None if reference is None else rows([reference.values[index] for index in part]),
            advantages=rows(advantage_rows),
            weights=rows(weight_rows),
            importance=None if importance is None else rows([importance[index] for index in part]),
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            beta=grpo.beta,
        )
        return scalar, sums.to_vector().cpu()

    return policy.update(sequences, loss)


def _weights(
    batch: UpdateBatch, part: range, lengths: Sequence[int], grpo: GrpoConfig, max_completion_tokens: int
) -> Tensor:
    """`[N]` weight of each completion's tokens."""
    counted = torch.tensor([batch.valid[index] for index in part])
    if grpo.mask_truncated:
        counted = without_truncated(counted, [batch.truncated[index] for index in part])
    if batch.correction.completion_kept is not None:
        counted = counted & batch.correction.completion_kept[part.start : part.stop]
    if grpo.aggregation == "constant":
        return constant_token_weights(lengths, counted.tolist(), max_completion_tokens=max_completion_tokens)
    return token_weights(lengths, counted.tolist(), aggregation=grpo.aggregation)
