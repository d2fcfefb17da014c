"""One RL step, from explanations to a changed policy (arXiv 2506.08388, section 3). It reads like the paper.

Every rank holds the whole batch; the engines split their work by their own layouts and hand all of it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from megatron_rlt.jobs.reward.scorer import FIRST
from megatron_rlt.jobs.rl.learner import LearnedStep
from megatron_rlt.jobs.train.engines import TrainContext
from megatron_rlt.jobs.train.rollouts import RolloutPart
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.rewards.rlt import combine_students
from megatron_rlt.types import RolloutGroup, ScoredCompletion, ScoredExplanation, StudentScores

ByStudent = Mapping[str, Sequence[StudentScores]]
"""Every student's scores of a step's completions, group by group."""


def step(
    context: TrainContext, rollouts: Iterable[RolloutPart], number: int, timer: PhaseTimer
) -> LearnedStep[ScoredExplanation]:
    """Let the students read explanations as they come, reward, compare within groups, update; `number` from 0."""
    groups, students = read_explanations(context, rollouts, timer)
    completions, gap = context.learner.score(groups, number, timer)
    explanations = reward(context, completions, students, timer)
    smallest = context.noise_floor.smallest_spread(explanations, context.learner.grpo.group_size, timer)
    return context.learner.learn(explanations, gap, number, timer, smallest_spread=smallest)


def read_explanations(
    context: TrainContext, rollouts: Iterable[RolloutPart], timer: PhaseTimer
) -> tuple[list[RolloutGroup], ByStudent]:
    """Score each part with every student as soon as it is there; returns all of it in the order of the batch.

    What is read together does not depend on the order in which parts come, so neither do the log-probs.
    """
    read: dict[int, tuple[RolloutPart, ByStudent]] = {}
    for part in rollouts:
        written = [(group.prompt, completion) for group in part.groups for completion in group.completions]
        read[part.index] = (
            part,
            {
                name: student.read(
                    [student.pairs.pair(*one) for one in written],
                    timer,
                    phase_name=FIRST if name == FIRST else f"{FIRST}_{name}",
                )
                for name, student in context.students.items()
            },
        )
    in_order = [read[index] for index in sorted(read)]
    groups = [group for part, _ in in_order for group in part.groups]
    return groups, {name: [one for _, scores in in_order for one in scores[name]] for name in context.students}


def reward(
    context: TrainContext, completions: Sequence[ScoredCompletion], students: ByStudent, timer: PhaseTimer
) -> tuple[ScoredExplanation, ...]:
    """Every student's reward of every completion, and the one that the teacher is trained on. Collective."""
    with timer.phase("reward") as phase:
        old = [one.old_logprobs for one in completions]
        rewards = {name: student.rewards(students[name], old) for name, student in context.students.items()}
        phase.model_flops = sum(
            (
                student.divergence_flops([one.pair for one in students[name]])
                for name, student in context.students.items()
            ),
            0.0,
        )
        explained = []
        for index, completion in enumerate(completions):
            by_student = {name: theirs[index] for name, theirs in rewards.items()}
            combined = combine_students(by_student, context.reduction)
            explained.append(
                ScoredExplanation(
                    **vars(replace(completion, reward=combined.total)),
                    students={name: theirs[index] for name, theirs in students.items()},
                    rewards=by_student,
                    combined=combined,
                )
            )
    return tuple(explained)
