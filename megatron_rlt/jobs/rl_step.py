"""One RL step, from problems to a changed policy (arXiv 2506.08388, section 3). It reads like the paper.

Every rank holds the whole batch; the engines split their work by their own layouts and hand all of it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.baselines import solution_baselines, student_work
from megatron_rlt.jobs.grpo import (
    Draw,
    UpdateBatch,
    compare_within_groups,
    follow_policy,
    rollout_work,
    sample_groups,
    update_policy,
)
from megatron_rlt.jobs.leaks import count_leaks
from megatron_rlt.jobs.mismatch import Mismatch
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
    mismatch: Mismatch  # of the sampling engine's log-probs with these
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
        phase.count(*rollout_work(rooms.rollout, groups))
    pairs = tuple(rooms.pairs.pair(group.prompt, completion) for group in groups for completion in group.completions)
    written = tuple(pair.teacher for pair in pairs)
    num_tokens = sum(len(sequence) for sequence in written)
    with timer.phase("old_policy") as phase:
        old_policy = rooms.old_policy.logprobs(written)
        phase.count(num_tokens, rooms.old_policy.model_flops(written))
    mismatch = rooms.mismatch.compare(groups, old_policy, number)
    with timer.phase("student") as phase:
        student = rooms.student.logprobs([pair.student for pair in pairs])
        baselines = solution_baselines(rooms.student, rooms.pairs.student, pairs, rooms.reward.solution_unit)
        phase.count(*student_work(rooms.student, rooms.pairs.student, pairs, rooms.reward.solution_unit))
    with timer.phase("reward") as phase:
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
        phase.model_flops = 0.0 if rooms.divergence is None else rooms.divergence.model_flops(pairs)
    by_student = {FIRST: rewards} | rooms.panel.rewards(groups, old_policy, leaks, timer)
    with timer.phase("reward"):
        rewards = rooms.panel.combined(by_student)
        advantages = compare(rewards, rooms.grpo)
    with timer.phase("reference") as phase:
        reference = None
        if rooms.reference is not None:
            reference = rooms.reference.logprobs(written)
            phase.count(num_tokens, rooms.reference.model_flops(written))
    with timer.phase("update") as phase:
        batch = UpdateBatch(
            sequences=written,
            advantages=advantages,
            valid=tuple(parts.valid for parts in rewards),
            truncated=tuple(FormatFlag.TRUNCATED in pair.flags for pair in pairs),
            old_policy=old_policy,
            correction=mismatch.correction,
            reference=reference,
        )
        updates = update_policy(rooms.policy, batch, rooms.grpo, max_completion_tokens=rooms.max_completion_tokens)
        follow_policy(rooms.reference_model, rooms.policy, rooms.grpo, number)
        phase.count(num_tokens, rooms.policy.model_flops(written))
    return StepResult(groups, pairs, old_policy, mismatch, student, leaks, by_student, rewards, advantages, updates)


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
