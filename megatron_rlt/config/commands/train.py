"""`train`: RL of a teacher with the RLT reward."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.models import ModelConfig, Shapes
from megatron_rlt.config.paths import tokenizer_faults
from megatron_rlt.config.reward import StudentsConfig, TrainRewardConfig
from megatron_rlt.config.rollout import ahead_faults


class TrainConfig(RlConfig):
    """Train a teacher by GRPO with the RLT reward: how well a frozen student predicts the solution after reading it."""

    policy_name: ClassVar[str] = "teacher"

    teacher: ModelConfig
    """The policy, which is trained."""
    student: ModelConfig
    """The frozen model whose predictions are the reward; the word `self` stands for the teacher's section: its initial
    weights, frozen, are then the student."""
    students: StudentsConfig | None = None
    """Further students, and how several rewards become one; None: `student` alone."""
    reward: TrainRewardConfig = TrainRewardConfig()
    """RLT reward."""

    @model_validator(mode="before")
    @classmethod
    def _read_self(cls, values: object) -> object:
        """`student: self` is the teacher's section: its folder holds the start, also when a run resumes."""
        if isinstance(values, dict) and values.get("student") == "self" and "teacher" in values:
            return {**values, "student": values["teacher"]}
        return values

    @property
    def students_by_name(self) -> dict[str, ModelConfig]:
        """`student`, then the further ones."""
        return {"student": self.student} | ({} if self.students is None else self.students.extra)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The teacher and all students."""
        students = {
            name if name == "student" else f"students.extra.{name}": one for name, one in self.students_by_name.items()
        }
        return {"teacher": self.teacher} | students

    def path_faults(self) -> list[str]:
        students = {name: model for name, model in self.models.items() if name != "teacher"}
        return [*tokenizer_faults(self.teacher, students, self.reward), *super().path_faults()]

    def faults(self, shapes: Shapes) -> list[str]:
        ahead = ahead_faults(self.rollout, self.mismatch)
        return [*super().faults(shapes), *ahead, *self._students_faults(), *self.reward.faults()]

    def _students_faults(self) -> list[str]:
        if self.students is None:
            return []
        faults, held_out = [], self.students.held_out
        if "student" in self.students.extra:
            faults.append("students.extra.student: the name belongs to the section `student`; give it another one")
        names = ["student", *self.students.extra]
        if held_out is not None and held_out not in names:
            faults.append(f"students.held_out={held_out}: must be one of {', '.join(names)}, or null")
        return faults
