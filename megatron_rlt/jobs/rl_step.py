"""One RL step, from problems to a changed policy (arXiv 2506.08388, section 3). It reads like the paper.

Every rank holds the whole batch; the engines split their work by their own layouts and hand all of it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import group_advantages
from megatron_rlt.algorithm.policy_loss import LossSums, policy_loss
from megatron_rlt.algorithm.token_weights import token_weights
from megatron_rlt.jobs.rewarding import reward_explanations
from megatron_rlt.jobs.rl_rooms import RlRooms
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.policy.policy import Update
from megatron_rlt.policy.reference import mix_into_reference
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.types import Completion, Logprobs, PackedBatch, Problem, RewardParts, RolloutGroup, ScoringPair


@dataclass(frozen=True, eq=False)
class StepResult:
    """One step's batch with all that became of it, the same on every rank."""

    groups: tuple[RolloutGroup, ...]
    pairs: tuple[ScoringPair, ...]  # one a completion, group by group
    old_policy: Logprobs  # of whole completions
    student: Logprobs  # of explanation, then solution
    rewards: tuple[RewardParts, ...]
    advantages: Tensor  # [N] float64
    updates: tuple[Update[Tensor], ...]  # records are LossSums as vectors

    @property
    def completions(self) -> tuple[Completion, ...]:
        return tuple(completion for group in self.groups for completion in group.completions)


def step(rooms: RlRooms, problems: Sequence[Problem], number: int, timer: PhaseTimer) -> StepResult:
    """Sample explanations, ask the student, reward, compare within groups, update. `number` counts from 0."""
    with timer.phase("rollout") as phase:
        groups = sample_groups(rooms, problems, number)
        phase.tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    pairs = tuple(rooms.pairs.pair(group.prompt, completion) for group in groups for completion in group.completions)
    with timer.phase("old_policy") as phase:
        old_policy = rooms.old_policy.logprobs([pair.teacher for pair in pairs])
        phase.tokens = sum(len(pair.teacher) for pair in pairs)
    with timer.phase("student") as phase:
        student = rooms.student.logprobs([pair.student for pair in pairs])
        phase.tokens = sum(len(pair.student) for pair in pairs)
    with timer.phase("reward"):
        rewards = reward_explanations(
            pairs, old_policy, student, divergence=rooms.divergence, reward=rooms.reward, penalties=rooms.penalties
        )
        advantages = compare_within_groups(rooms, rewards)
    with timer.phase("reference") as phase:
        reference = None if rooms.reference is None else rooms.reference.logprobs([pair.teacher for pair in pairs])
        phase.tokens = 0 if reference is None else sum(len(pair.teacher) for pair in pairs)
    with timer.phase("update") as phase:
        updates = update_policy(rooms, pairs, rewards, advantages, old_policy, reference)
        move_reference(rooms, number)
        phase.tokens = sum(len(pair.teacher) for pair in pairs)
    return StepResult(groups, pairs, old_policy, student, rewards, advantages, updates)


def sample_groups(rooms: RlRooms, problems: Sequence[Problem], number: int) -> tuple[RolloutGroup, ...]:
    """pi_T(e | q, s): `group_size` explanations of every question."""
    prompts = [rooms.pairs.teacher.prompt(problem) for problem in problems]
    size = rooms.grpo.group_size
    requests = [
        SampleRequest(prompt.token_ids, completion_seed(rooms.seed, number, question, member))
        for question, prompt in enumerate(prompts)
        for member in range(size)
    ]
    completions = rooms.rollout.generate(requests, policy_version=rooms.policy.num_updates)
    return tuple(
        RolloutGroup(prompt, tuple(completions[size * question : size * (question + 1)]))
        for question, prompt in enumerate(prompts)
    )


def compare_within_groups(rooms: RlRooms, rewards: Sequence[RewardParts]) -> Tensor:
    """`[N]` advantages: how much better an explanation is than the others of its question."""
    size = rooms.grpo.group_size
    values = torch.split(torch.tensor([parts.reward for parts in rewards], dtype=torch.float64), size)
    valid = torch.split(torch.tensor([parts.valid for parts in rewards]), size)
    return torch.cat(
        [
            group_advantages(group, usable, normalize_std=rooms.grpo.normalize_std, std_epsilon=rooms.grpo.std_epsilon)
            for group, usable in zip(values, valid, strict=True)
        ]
    )


def update_policy(
    rooms: RlRooms,
    pairs: Sequence[ScoringPair],
    rewards: Sequence[RewardParts],
    advantages: Tensor,
    old_policy: Logprobs,
    reference: Logprobs | None,
) -> tuple[Update[Tensor], ...]:
    """One or several optimizer steps, each on an equal part of the groups with its own denominator."""
    size = len(pairs) // rooms.grpo.updates_per_batch
    return tuple(
        _update_on(rooms, range(start, start + size), pairs, rewards, advantages, old_policy, reference)
        for start in range(0, len(pairs), size)
    )


def _update_on(
    rooms: RlRooms,
    part: range,
    pairs: Sequence[ScoringPair],
    rewards: Sequence[RewardParts],
    advantages: Tensor,
    old_policy: Logprobs,
    reference: Logprobs | None,
) -> Update[Tensor]:
    grpo = rooms.grpo
    sequences = [pairs[index].teacher for index in part]
    lengths = [sequence.num_targets for sequence in sequences]
    weights = token_weights(lengths, [rewards[index].valid for index in part], aggregation=grpo.aggregation)
    weight_rows = [weight.expand(length) for weight, length in zip(weights, lengths, strict=True)]
    advantage_rows = [advantages[index].expand(length) for index, length in zip(part, lengths, strict=True)]

    def loss(batch: PackedBatch, logprobs: Tensor, _entropy: Tensor) -> tuple[Tensor, Tensor]:
        def rows(values: Sequence[Tensor]) -> Tensor:
            return batch.join(values).to(logprobs.device)

        # The paper's one update a batch is strictly on-policy: its ratio is 1 and needs no earlier log-probs.
        on_policy = grpo.updates_per_batch == 1
        scalar, sums = policy_loss(
            logprobs,
            old_logprobs=None if on_policy else rows([old_policy.values[index] for index in part]),
            reference_logprobs=None if reference is None else rows([reference.values[index] for index in part]),
            advantages=rows(advantage_rows),
            weights=rows(weight_rows),
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            beta=grpo.beta,
        )
        return scalar, sums.to_vector().cpu()

    return rooms.policy.update(sequences, loss)


def move_reference(rooms: RlRooms, number: int) -> None:
    """Every n steps: reference <- mix * policy + (1 - mix) * reference."""
    interval = rooms.grpo.reference_sync_steps
    if rooms.reference_model is not None and interval is not None and (number + 1) % interval == 0:
        mix_into_reference(rooms.reference_model, rooms.policy.model, policy_share=rooms.grpo.reference_mix)


def loss_sums(updates: Sequence[Update[Tensor]]) -> LossSums:
    """All updates' sums together."""
    parts = [LossSums.from_vector(record) for update in updates for record in update.records]
    return LossSums.total(parts, torch.device("cpu"))
