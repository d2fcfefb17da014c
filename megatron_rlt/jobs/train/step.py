"""One RL step, from explanations to a changed policy (arXiv 2506.08388, section 3). It reads like the paper.

Every rank holds the whole batch; the engines split their work by their own layouts and hand all of it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.config.sections import GrpoConfig
from megatron_rlt.jobs.reward.baselines import solution_baselines, student_work
from megatron_rlt.jobs.reward.leaks import count_leaks
from megatron_rlt.jobs.reward.score_pairs import reward_explanations
from megatron_rlt.jobs.reward.student_panel import FIRST, StudentRewards
from megatron_rlt.jobs.rl.grpo import UpdateBatch, compare_within_groups, follow_policy, update_policy
from megatron_rlt.jobs.rl.mismatch import Mismatch
from megatron_rlt.jobs.train.engines import RlRooms
from megatron_rlt.jobs.train.rollouts import Explained
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.policy.policy import Update
from megatron_rlt.types import Completion, FormatFlag, LeakMetrics, Logprobs, RewardParts, RolloutGroup, ScoringPair


@dataclass(frozen=True, eq=False)
class Reading:
    """What the student says of explanations and solutions: log pi_S(e | q), log pi_S(s | q, e)."""

    groups: tuple[RolloutGroup, ...]
    pairs: tuple[ScoringPair, ...]  # one a completion, group by group
    student: Logprobs  # of these
    baselines: tuple[Tensor | None, ...]  # of these, see `baselines.solution_baselines`

    @classmethod
    def joined(cls, parts: Sequence[Reading]) -> Reading:
        """Several as one, in their order."""
        return cls(
            tuple(group for part in parts for group in part.groups),
            tuple(pair for part in parts for pair in part.pairs),
            Logprobs.joined([part.student for part in parts]),
            tuple(baseline for part in parts for baseline in part.baselines),
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


def step(rooms: RlRooms, explanations: Iterable[Explained], number: int, timer: PhaseTimer) -> StepResult:
    """Let the student read explanations as they come, reward, compare within groups, update.

    Args:
        explanations: all parts of the step's batch, in any order.
        number: of the step, from 0.
    """
    reading = read_explanations(rooms, explanations, timer)
    groups, pairs, student = reading.groups, reading.pairs, reading.student
    written = tuple(pair.teacher for pair in pairs)
    num_tokens = sum(len(sequence) for sequence in written)
    with timer.phase("old_policy") as phase:
        old_policy = rooms.old_policy.logprobs(written)
        phase.count(num_tokens, rooms.old_policy.model_flops(written))
    mismatch = rooms.mismatch.compare(groups, old_policy, number, rooms.policy.num_updates)
    with timer.phase("reward") as phase:
        leaks = count_leaks(pairs, rooms.reward.leaks)
        rewards = reward_explanations(
            pairs,
            old_policy,
            student,
            reading.baselines,
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


def read_explanations(rooms: RlRooms, explanations: Iterable[Explained], timer: PhaseTimer) -> Reading:
    """Let the student read each part as soon as it is there; returns all of it in the order of the batch.

    What is read together does not depend on the order in which parts come, so neither do the log-probs.
    """
    parts: dict[int, Reading] = {}
    for explained in explanations:
        pairs = tuple(rooms.pairs.pair(group.prompt, one) for group in explained.groups for one in group.completions)
        with timer.phase("student") as phase:
            reads, unit = rooms.pairs.student, rooms.reward.solution_unit
            parts[explained.part] = Reading(
                explained.groups,
                pairs,
                rooms.student.logprobs([pair.student for pair in pairs]),
                solution_baselines(rooms.student, reads, pairs, unit),
            )
            phase.count(*student_work(rooms.student, reads, pairs, unit))
    return Reading.joined([parts[number] for number in sorted(parts)])


def compare(rewards: Sequence[RewardParts], grpo: GrpoConfig) -> Tensor:
    """`[N]` advantages; a completion without a reward takes no part in its group."""
    return compare_within_groups(
        torch.tensor([parts.reward for parts in rewards], dtype=torch.float64),
        torch.tensor([parts.valid for parts in rewards]),
        grpo,
    )
