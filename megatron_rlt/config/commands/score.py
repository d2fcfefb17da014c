"""TODO megatron_rlt/config/commands/score.py."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.path_rules import _model_faults, _row_file_faults, _run_faults, _tokenizer_faults
from megatron_rlt.config.plan import Plan, _model_plan, _replicas
from megatron_rlt.config.rules import Shapes, layout_faults
from megatron_rlt.config.sections import (
    ModelConfig,
    Placebo,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    RewardConfig,
    ScoringConfig,
)


class ScoreConfig(JobConfig):
    """`megatron-rlt score`: the RLT reward of explanations that already exist."""

    teacher: ModelConfig
    """The model whose distribution r_KL compares with the student's."""
    student: ModelConfig
    """The frozen model whose predictions are the reward."""
    input: Path
    """JSONL or Parquet with id, question, solution, explanation."""
    output: Path
    """Parquet file to write, rows in the input's order."""
    rows_per_part: PositiveInt = 256
    """Rows scored between two saves; a run started again continues after the last save."""
    temperature: PositiveFloat = 0.7
    """Of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    scoring: ScoringConfig = ScoringConfig()
    """Packing and block sizes."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    placebo: Placebo = "none"
    """Scored in an explanation's place: another question's, its tokens shuffled, or nothing; none: no such control."""
    baseline: bool = True
    """Also ask the student for each solution without an explanation, once a question and part; gives the gain."""


def score_faults(config: ScoreConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `score`."""
    return layout_faults({"teacher": config.teacher, "student": config.student}, shapes, config.world_size)


def score_path_faults(config: ScoreConfig) -> list[str]:
    """Broken rules about the files of `score`."""
    faults = [
        *_model_faults({"teacher": config.teacher, "student": config.student}),
        *_tokenizer_faults("student", config.student, teacher=config.teacher, reward=config.reward),
        *_row_file_faults("input", config.input),
        *_run_faults(config),
    ]
    if config.output.suffix != ".parquet" or config.output.is_dir():
        faults.append(f"output: {config.output} must be a Parquet file to write; give a name that ends in .parquet")
    if config.output == config.input:
        faults.append(f"output: {config.output} would overwrite input; give another name")
    return faults


def plan_score(config: ScoreConfig, shapes: Shapes) -> Plan:
    """The plan of `score`; the configuration must break no rule."""
    models = {"teacher": config.teacher, "student": config.student}
    numbers = [("rows per saved part", config.rows_per_part)]
    for name, model in models.items():
        share = math.ceil(config.rows_per_part / _replicas(model, config.world_size))
        numbers.append((f"{name} sequences per data-parallel rank and part, at most", share))
    plans = (_model_plan(name, model, shapes[name], config.world_size, use="frozen") for name, model in models.items())
    return Plan(tuple(numbers), tuple(plans))
