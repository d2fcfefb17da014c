"""`score`: the RLT reward of explanations that already exist."""

from __future__ import annotations

import math
import os
from pathlib import Path

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.models import PAPER_TEMPERATURE, ModelConfig, ScoringConfig, Shapes
from megatron_rlt.config.paths import output_file_faults, row_file_faults, tokenizer_faults
from megatron_rlt.config.plan import Plan, frozen_plans, replicas
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.reward import Control, RewardConfig
from megatron_rlt.config.section import (
    FilePath,
    PositiveInt,
    Temperature,
)


class ScoreConfig(JobConfig):
    """Compute the RLT reward of explanations that already exist, without training."""

    teacher: ModelConfig
    """The model whose distribution r_KL compares with the student's."""
    student: ModelConfig
    """The frozen model whose predictions are the reward."""
    input: FilePath
    """JSONL or Parquet with id, question, solution, explanation."""
    output: FilePath
    """Parquet file to write, with the rows in the input's order."""
    rows_per_part: PositiveInt = 256
    """Rows per saved part; a resumed run continues after the last saved part."""
    temperature: Temperature = PAPER_TEMPERATURE
    """Temperature of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    scoring: ScoringConfig = ScoringConfig()
    """Packing and block sizes of the log-prob passes."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    control: Control = "none"
    """What is scored instead of each explanation: another question's, its tokens shuffled, or an empty one; none: no
    control, the explanation itself."""
    baseline: bool = True
    """Also score each solution without an explanation, once per question and part, and report the gain over it."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """Teacher and student."""
        return {"teacher": self.teacher, "student": self.student}

    def written_files(self) -> tuple[Path, ...]:
        return (self.output,)

    def path_faults(self) -> list[str]:
        faults = [
            *tokenizer_faults(self.teacher, {"student": self.student}, self.reward),
            *row_file_faults("input", self.input),
            *super().path_faults(),
        ]
        faults += output_file_faults("output", self.output)
        if os.path.realpath(self.output) == os.path.realpath(self.input):
            faults.append(f"output: {self.output} would overwrite input; give another name")
        return faults

    def plan(self, shapes: Shapes) -> Plan:
        numbers = [("rows per saved part", self.rows_per_part)]
        for name, model in self.models.items():
            share = math.ceil(self.rows_per_part / replicas(model, self.world_size))
            numbers.append((f"{name} sequences per data-parallel rank and part, at most", share))
        return Plan(tuple(numbers), frozen_plans(self.models, shapes, self.world_size))
