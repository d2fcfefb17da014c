"""One RL step, from problems to a changed policy (arXiv 2506.08388, section 3). It reads like the paper.

Every rank holds the whole batch; the engines split their work by their own layouts and hand all of it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.baselines import solution_baselines
from megatron_rlt.jobs.grpo import Draw, UpdateBatch, compare_within_groups, follow_policy, sample_groups, update_policy
from megatron_rlt.jobs.leaks import count_leaks
from megatron_rlt.jobs.rewarding import reward_explanations
from megatron_rlt.jobs.rl_rooms import RlRooms
from megatron_rlt.jobs.student_panel import FIRST, StudentRewards
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.policy.policy import Update
from megatron_rlt.types import (
    Completion,
    FormatFlag,
    LeakMetrics,
    Logprobs,
    Problem,
    RewardParts,
    RolloutGroup,
    ScoringPair,
)


@dataclass(frozen=True, eq=False)
class StepResult:
    """One step's batch with all that became of it, the same on every rank."""

    groups: tuple[RolloutGroup, ...]
    pairs: tuple[ScoringPair, ...]  # one a completion, group by group
    old_policy: Logprobs  # of whole completions
    student: Logprobs  # of explanation, then solution, in the student's tokens
    leaks: tuple[LeakMetrics, ...]
    by_student: StudentRewards  # each student's own
    rewards: tuple[RewardParts, ...]  # the first student's parts; the reward is that of all students that count
    advantages: Tensor  # [N] float64
    updates: tuple[Update[Tensor], ...]  # records are LossSums as vectors

    @property
    def completions(self) -> tuple[Completion, ...]:
        return tuple(completion for group in self.groups for completion in group.completions)


def step(rooms: RlRooms, problems: Sequence[Problem], number: int, timer: PhaseTimer) -> StepResult:
    """Sample explanations, ask the student, reward, compare within groups, update. `number` counts from 0."""
    with timer.phase("rollout") as phase:
        groups = explain(rooms, problems, number)
        phase.tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    pairs = tuple(rooms.pairs.pair(group.prompt, completion) for group in groups for completion in group.completions)
    with timer.phase("old_policy") as phase:
        old_policy = rooms.old_policy.logprobs([pair.teacher for pair in pairs])
        phase.tokens = sum(len(pair.teacher) for pair in pairs)
    with timer.phase("student") as phase:
        student = rooms.student.logprobs([pair.student for pair in pairs])
        baselines = solution_baselines(rooms.student, rooms.pairs.student, pairs, rooms.reward.solution_unit)
        phase.tokens = sum(len(pair.student) for pair in pairs)
    with timer.phase("reward"):
        leaks = count_leaks(pairs, rooms.reward.leaks)
        rewards = reward_explanations(
            pairs,
            old_policy,
            student,
            baselines,
            leaks,
            divergence=rooms.divergence,
            reward=rooms.reward,
            penalties=rooms.penalties,
        )
    by_student = {FIRST: rewards} | rooms.panel.rewards(groups, old_policy, leaks, timer)
    with timer.phase("reward"):
        rewards = rooms.panel.combined(by_student)
        advantages = compare(rewards, rooms.grpo)
    with timer.phase("reference") as phase:
        reference = None if rooms.reference is None else rooms.reference.logprobs([pair.teacher for pair in pairs])
        phase.tokens = 0 if reference is None else sum(len(pair.teacher) for pair in pairs)
    with timer.phase("update") as phase:
        batch = UpdateBatch(
            sequences=tuple(pair.teacher for pair in pairs),
            advantages=advantages,
            valid=tuple(parts.valid for parts in rewards),
            truncated=tuple(FormatFlag.TRUNCATED in pair.flags for pair in pairs),
            old_policy=old_policy,
            reference=reference,
        )
        updates = update_policy(rooms.policy, batch, rooms.grpo, max_completion_tokens=rooms.max_completion_tokens)
        follow_policy(rooms.reference_model, rooms.policy, rooms.grpo, number)
        phase.tokens = sum(len(pair.teacher) for pair in pairs)
    return StepResult(groups, pairs, old_policy, student, leaks, by_student, rewards, advantages, updates)


def explain(rooms: RlRooms, problems: Sequence[Problem], number: int) -> tuple[RolloutGroup, ...]:
    """pi_T(e | q, s): `group_size` explanations of every question."""
    return sample_groups(
        rooms.rollout,
        [rooms.pairs.teacher.prompt(problem) for problem in problems],
        Draw(rooms.seed, number, first_question=0),
        group_size=rooms.grpo.group_size,
        policy_version=rooms.policy.num_updates,
    )


def compare(rewards: Sequence[RewardParts], grpo: GrpoConfig) -> Tensor:
    """`[N]` advantages; a completion without a reward takes no part in its group."""
    return compare_within_groups(
        torch.tensor([parts.reward for parts in rewards], dtype=torch.float64),
        torch.tensor([parts.valid for parts in rewards]),
        grpo,
    )
