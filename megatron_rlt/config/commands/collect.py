"""TODO megatron_rlt/config/commands/collect.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.path_rules import _data_faults, _model_faults, _run_faults, _tokenizer_faults
from megatron_rlt.config.plan import Plan, _model_plan, _replicas
from megatron_rlt.config.rollout import RolloutConfig, ahead_faults, rollout_faults
from megatron_rlt.config.rules import Shapes, _length_faults, layout_faults
from megatron_rlt.config.sections import (
    ModelConfig,
    Placebo,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    RewardConfig,
    ScoringConfig,
    Section,
)


class SelectionConfig(Section):
    """Which explanations of a question become training rows."""

    rule: Literal["first", "best_of_n", "fits", "all"] = "first"
    """One a question: the first, the best by reward, or the best that fits max_student_tokens; or all of them."""
    max_student_tokens: PositiveInt | None = None
    """For `fits`: longest student sequence (prompt, explanation, solution); where none fits, the best by reward."""
    malformed: Literal["last_resort", "never", "allowed"] = "last_resort"
    """Malformed explanations may be chosen: only where a question has no well-formed one, never, or like all others."""

    @property
    def name(self) -> str:
        """The selection in a few words that can be part of a file's name; another selection has another one."""
        words: list[str] = [self.rule]
        if self.max_student_tokens is not None:
            words.append(str(self.max_student_tokens))
        if self.malformed != "last_resort":
            words.append(f"malformed_{self.malformed}")
        return "_".join(words)


class CollectConfig(JobConfig):
    """`megatron-rlt collect`: a teacher's explanations of a data set, scored by a student if one is given."""

    teacher: ModelConfig
    """The model that explains: a Hugging Face folder, such as `hf/` of a training run."""
    teacher_checkpoint: Path | None = None
    """A run's `checkpoints/step-N` whose weights replace those of teacher.model, the folder that run began with."""
    student: ModelConfig | None = None
    """The frozen model whose predictions are the reward; None: explanations are collected without scores."""
    data: Path
    """Questions and solutions: folder of shards written by `prepare`, or one JSONL or Parquet file."""
    num_explanations: PositiveInt = 1
    """Explanations sampled for each question."""
    questions_per_part: PositiveInt = 256
    """Questions between two saves; a run started again continues after the last save."""
    temperature: PositiveFloat = 0.7
    """Of sampling and of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes of teacher and student."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    placebo: Placebo = "none"
    """Scored in an explanation's place: another question's, its tokens shuffled, or nothing; none: no such control."""
    selection: SelectionConfig = SelectionConfig()
    """Which explanations become training rows; may change on a collection that is there already."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models it runs, by their section's name."""
        return {"teacher": self.teacher} | ({} if self.student is None else {"student": self.student})


def collect_faults(config: CollectConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `collect`."""
    tokens = config.prompts.max_prompt_tokens + config.rollout.max_completion_tokens
    return [
        *layout_faults(config.models, shapes, config.world_size),
        # A student may read less than its teacher: what is too long for it is collected without a reward.
        *_length_faults(
            {name: shape for name, shape in shapes.items() if name == "teacher"},
            tokens,
            what=f"prompts.max_prompt_tokens + rollout.max_completion_tokens = {config.prompts.max_prompt_tokens}"
            f" + {config.rollout.max_completion_tokens} = {tokens}",
            remedy="lower rollout.max_completion_tokens or prompts.max_prompt_tokens",
        ),
        *rollout_faults(config.rollout, config.teacher, shapes.get("teacher"), config.world_size),
        *ahead_faults(config.rollout, None),
        *_selection_faults(config),
    ]


def _selection_faults(config: CollectConfig) -> list[str]:
    selection, faults = config.selection, []
    if selection.rule == "best_of_n" and config.num_explanations == 1:
        faults.append(
            "num_explanations=1: leaves selection.rule=best_of_n nothing to choose from; set num_explanations=8, or"
            " rule=first"
        )
    if selection.rule == "fits" and selection.max_student_tokens is None:
        faults.append(
            "selection.max_student_tokens=null: selection.rule=fits needs it; set the student's context length"
        )
    if selection.rule != "fits" and selection.max_student_tokens is not None:
        faults.append(
            f"selection.max_student_tokens={selection.max_student_tokens}: has no effect with"
            f" selection.rule={selection.rule}; use rule=fits, or leave max_student_tokens out"
        )
    if config.student is not None:
        return faults
    without_effect = {
        "selection.rule=best_of_n": selection.rule == "best_of_n",
        f"placebo={config.placebo}": config.placebo != "none",
        "reward": config.reward != RewardConfig(),
        "scoring": config.scoring != ScoringConfig(),
    }
    return faults + [
        f"{setting}: explanations are scored only by a student; set student.model, or leave it out"
        for setting, is_set in without_effect.items()
        if is_set
    ]


def collect_path_faults(config: CollectConfig) -> list[str]:
    """Broken rules about the files of `collect`."""
    faults = _model_faults(config.models)
    if config.student is not None:
        faults += _tokenizer_faults("student", config.student, teacher=config.teacher, reward=config.reward)
    if config.teacher_checkpoint is not None and not (config.teacher_checkpoint / "manifest.json").is_file():
        faults.append(
            f"teacher_checkpoint: {config.teacher_checkpoint} holds no checkpoint (no manifest.json); give a folder"
            " `checkpoints/step-N` of a run"
        )
    return [*faults, *_data_faults("data", config.data), *_run_faults(config)]


def plan_collect(config: CollectConfig, shapes: Shapes, *, num_rows: int | None) -> Plan:
    """The plan of `collect`; the configuration must break no rule.

    Args:
        num_rows: rows of the data set; None where unknown, then numbers that need it are left out.
    """
    questions = config.questions_per_part if num_rows is None else min(config.questions_per_part, num_rows)
    per_part = questions * config.num_explanations
    numbers = [("explanations of each question", config.num_explanations)]
    if num_rows is not None:
        numbers += [
            ("questions, at most", num_rows),
            ("explanations, at most", num_rows * config.num_explanations),
            ("saved parts", math.ceil(num_rows / config.questions_per_part)),
        ]
    numbers += [
        ("explanations in a saved part", per_part),
        ("sampled tokens per part, at most", per_part * config.rollout.max_completion_tokens),
    ]
    for name, model in config.models.items():
        share = math.ceil(per_part / _replicas(model, config.world_size))
        numbers.append((f"{name} sequences per data-parallel rank and part, at most", share))
    plans = (
        _model_plan(name, model, shapes[name], config.world_size, use="frozen") for name, model in config.models.items()
    )
    return Plan(tuple(numbers), tuple(plans))
