"""The configuration of `train` with a `verifier` section: a student's own RL, rewarded for right answers."""

from __future__ import annotations

from typing import ClassVar

from megatron_rlt.config.commands.job import AnswerKind, RlConfig
from megatron_rlt.config.commands.path_rules import _data_faults, _model_faults, _run_faults
from megatron_rlt.config.sections import (
    ModelConfig,
    PositiveFloat,
    PositiveInt,
    Section,
)


class VerifierConfig(Section):
    """Reward by checking answers against each row's solution."""

    kind: AnswerKind
    """How answers are judged: math (math-verify), choice (a letter), countdown (exact arithmetic), exact (words)."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of any other."""
    well_formed_bonus: float = 0.0
    """Added where thought and solution stand in their tags."""
    malformed: float = 0.0
    """Added where they do not; a penalty is negative."""
    overlong_buffer_tokens: PositiveInt | None = None
    """DAPO's soft punishment: last tokens of the budget, in which the reward falls evenly; None: it does not fall."""
    overlong_weight: PositiveFloat = 1.0
    """How much the reward has fallen at the end of the budget."""
    prefill_thought: bool = True
    """End the prompt with the thought's opening tag, as models trained by `sft` expect; False for other models."""
    timeout_seconds: PositiveFloat = 5.0
    """Processor time for one comparison by math-verify; an answer that takes longer is wrong."""
    max_sampling_rounds: PositiveInt = 1
    """DAPO's dynamic sampling: rounds of drawing, in which all-right and all-wrong questions are replaced; 1: none."""


class SolverConfig(RlConfig):
    """`megatron-rlt train` with a verifiable reward: no teacher, the student itself is trained."""

    policy_name: ClassVar[str] = "student"

    student: ModelConfig
    """The policy: it is trained."""
    verifier: VerifierConfig
    """Reward."""
    temperature: PositiveFloat = 1.0
    """Of sampling and of every log-prob."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The student."""
        return {"student": self.student}


def verifier_faults(config: SolverConfig) -> list[str]:
    """Broken rules of a verifiable reward."""
    verifier, budget, faults = config.verifier, config.rollout.max_completion_tokens, []
    if verifier.overlong_buffer_tokens is not None and verifier.overlong_buffer_tokens > budget:
        faults.append(
            f"verifier.overlong_buffer_tokens={verifier.overlong_buffer_tokens}: must not exceed"
            f" rollout.max_completion_tokens={budget}; nearest valid: {budget}"
        )
    if (
        verifier.overlong_buffer_tokens is None
        and verifier.overlong_weight != VerifierConfig.model_fields["overlong_weight"].default
    ):
        faults.append(
            f"verifier.overlong_weight={verifier.overlong_weight:g}: has no effect without"
            " verifier.overlong_buffer_tokens; set it, or leave overlong_weight out"
        )
    return faults


def solver_path_faults(config: SolverConfig) -> list[str]:
    """Broken rules about the files of `train` with a verifiable reward."""
    return [*_model_faults(config.models), *_data_faults("data.path", config.data.path), *_run_faults(config)]
