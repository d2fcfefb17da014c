"""`rlvr`: RL with verifiable rewards, a student's own RL."""

from __future__ import annotations

from typing import ClassVar

from megatron_rlt.config.commands.job import AnswerKind
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.models import ModelConfig, Shapes
from megatron_rlt.config.rollout import ahead_faults
from megatron_rlt.config.section import (
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    Temperature,
)


class OverlongConfig(Section):
    """DAPO's soft punishment: the reward falls evenly over the last tokens of the budget."""

    buffer_tokens: PositiveInt
    """Number of those last tokens."""
    weight: PositiveFloat = 1.0
    """By how much the reward has fallen at the end of the budget."""


class VerifierConfig(Section):
    """How answers are verified against each row's solution, and rewarded."""

    kind: AnswerKind
    """How answers are verified: math (math-verify), choice (a letter), countdown (exact arithmetic), exact (words)."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of any other answer."""
    well_formed_bonus: float = 0.0
    """Added to the reward of an answer whose thought and solution stand in their tags."""
    malformed: float = 0.0
    """Added to the reward of any other answer; a penalty is negative."""
    overlong: OverlongConfig | None = None
    """DAPO's soft punishment of long answers; None: none."""
    prefill_thought: bool = True
    """End the prompt with the thought's opening tag, as models trained by `sft` expect; False for other models."""
    timeout_seconds: Seconds = 5.0
    """Longest CPU time of one comparison by math-verify, in seconds; an answer that takes longer is wrong."""
    max_sampling_rounds: PositiveInt = 1
    """DAPO's dynamic sampling: rounds per step, in which questions that are answered all right or all wrong are
    replaced by others; 1: no question is replaced."""


class RlvrConfig(RlConfig):
    """Train a student by RL with verifiable rewards: it answers questions itself, and right answers are rewarded."""

    policy_name: ClassVar[str] = "student"

    student: ModelConfig
    """The policy, which is trained."""
    verifier: VerifierConfig
    """The reward."""
    temperature: Temperature = 1.0
    """Temperature of sampling and of every log-prob."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The student."""
        return {"student": self.student}

    def faults(self, shapes: Shapes) -> list[str]:
        ahead = ahead_faults(self.rollout, None)
        return [*super().faults(shapes), *ahead, *self._overlong_faults()]

    def _overlong_faults(self) -> list[str]:
        overlong, budget = self.verifier.overlong, self.rollout.max_completion_tokens
        if overlong is None or overlong.buffer_tokens <= budget:
            return []
        return [
            f"verifier.overlong.buffer_tokens={overlong.buffer_tokens}: must not exceed"
            f" rollout.max_completion_tokens={budget}; nearest valid: {budget}"
        ]
