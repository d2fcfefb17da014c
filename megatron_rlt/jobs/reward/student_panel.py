"""Several students of one RL run: each reads every explanation in its own way, and their rewards become one.

In: completions, and the teacher's log-probs of them. Out: every student's rewards by its name, and the reward that the
teacher is trained on. The formula of one reward is `rewarding.py`'s; how several become one is `rewards/`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_rlt.config.sections import RewardConfig, StudentsConfig
from megatron_rlt.jobs.reward.baselines import solution_baselines, student_work
from megatron_rlt.jobs.reward.score_pairs import reward_explanations
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.students import combine_students
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import FormatFlag, LeakMetrics, Logprobs, RewardParts, RolloutGroup

FIRST = "student"
"""Name of the student that every run has."""


StudentRewards = Mapping[str, tuple[RewardParts, ...]]


@dataclass(frozen=True)
class FurtherStudent:
    """A frozen student beside the first one."""

    engine: LogprobEngine
    pairs: PairBuilder
    divergence: DivergenceEngine | None  # only for the exact KL


@dataclass(frozen=True)
class StudentPanel:
    """All students but the first, and what becomes of several rewards."""

    further: Mapping[str, FurtherStudent]
    settings: StudentsConfig
    reward: RewardConfig
    penalties: Mapping[FormatFlag, float]

    def rewards(
        self, groups: Sequence[RolloutGroup], old_policy: Logprobs, leaks: Sequence[LeakMetrics], timer: PhaseTimer
    ) -> dict[str, tuple[RewardParts, ...]]:
        """The further students' rewards by name, one a completion. Collective: every rank passes the same groups.

        Args:
            old_policy: the teacher's log-probs of whole completions.
            leaks: of each completion's explanation.
        """
        found = {}
        for name, student in self.further.items():
            pairs = [student.pairs.pair(group.prompt, one) for group in groups for one in group.completions]
            with timer.phase(f"student_{name}") as phase:
                found[name] = reward_explanations(
                    pairs,
                    old_policy,
                    student.engine.logprobs([pair.student for pair in pairs]),
                    solution_baselines(student.engine, student.pairs.student, pairs, self.reward.solution_unit),
                    leaks,
                    divergence=student.divergence,
                    reward=self.reward,
                    penalties=self.penalties,
                )
                unit = self.reward.solution_unit
                phase.count(*student_work(student.engine, student.pairs.student, pairs, unit))
                phase.model_flops += 0.0 if student.divergence is None else student.divergence.model_flops(pairs)
        return found

    def combined(self, rewards: StudentRewards) -> tuple[RewardParts, ...]:
        """The first student's parts with the reward of all that count; with one student its own, to the bit."""
        first = rewards[FIRST]
        if not self.further:
            return first
        return tuple(
            replace(
                parts,
                reward=combine_students(
                    {name: theirs[index].reward for name, theirs in rewards.items()},
                    reduction=self.settings.reduction,
                    held_out=self.settings.held_out,
                ),
            )
            for index, parts in enumerate(first)
        )
