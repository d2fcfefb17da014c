"""`collect`: a teacher's explanations of a data set, scored by a student, and the training rows among them."""

from __future__ import annotations

import math
from typing import Literal

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.fp8 import not_scoring_faults
from megatron_rlt.config.models import PAPER_TEMPERATURE, ModelConfig, ScoringConfig, Shapes, budget_faults
from megatron_rlt.config.paths import count_rows, data_faults, tokenizer_faults
from megatron_rlt.config.plan import Plan, frozen_plans, replicas
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.reward import Control, RewardConfig
from megatron_rlt.config.rollout import RolloutConfig, ahead_faults, engine_faults, rollout_faults
from megatron_rlt.config.section import (
    Count,
    FilePath,
    NonNegativeInt,
    PositiveInt,
    Section,
    Temperature,
)


class SelectionConfig(Section):
    """Which explanations of a question become training rows."""

    rule: Literal["first", "best_of_n", "all"] = "first"
    """Selected per question: the first explanation, the best by reward, or all."""
    max_student_tokens: PositiveInt | None = None
    """Longest student sequence (prompt, explanation, solution) in tokens; longer ones are selected only where a
    question has no shorter one. None: any length."""
    malformed: Literal["last_resort", "never", "allowed"] = "last_resort"
    """When a malformed explanation is selected: only where a question has no well-formed one, never, or like others."""

    @property
    def name(self) -> str:
        """The selection in a few words that can be part of a file's name; another selection has another one."""
        words: list[str] = [self.rule]
        if self.max_student_tokens is not None:
            words.append(str(self.max_student_tokens))
        if self.malformed != "last_resort":
            words.append(f"malformed_{self.malformed}")
        return "_".join(words)


class ShareConfig(Section):
    """One of several collections that together explain all questions; joined in order they equal one collection."""

    index: NonNegativeInt
    """Which share, from 0: a run of consecutive questions."""
    count: PositiveInt
    """Number of shares."""

    def rows(self, num_rows: int) -> range:
        """The numbers of its rows, which count from 1."""
        return range(self.index * num_rows // self.count + 1, (self.index + 1) * num_rows // self.count + 1)


class CollectConfig(JobConfig):
    """Collect a teacher's explanations of a data set, score them with a student, and select training rows."""

    teacher: ModelConfig
    """The model that writes explanations, such as `hf/` of a training run."""
    teacher_checkpoint: FilePath | None = None
    """Folder `checkpoints/step-N` of a run: its weights replace those of teacher.model, with which the run began."""
    student: ModelConfig | None = None
    """The frozen model whose predictions are the reward; None: explanations are collected without rewards."""
    data: FilePath
    """Questions and solutions: folder of shards written by `prepare`, or one JSONL or Parquet file."""
    share: ShareConfig | None = None
    """Explain only a share of the questions, as the tasks of an array do; None: all."""
    num_explanations: Count = 1
    """Explanations sampled per question."""
    questions_per_part: PositiveInt = 256
    """Questions per saved part; a resumed run continues after the last saved part."""
    temperature: Temperature = PAPER_TEMPERATURE
    """Temperature of sampling and of every log-prob."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    rollout: RolloutConfig = RolloutConfig()
    """How explanations are sampled, and by which engine."""
    scoring: ScoringConfig = ScoringConfig()
    """Log-prob passes of teacher and student."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""
    control: Control = "none"
    """What is scored instead of each explanation: another question's, its tokens shuffled, or an empty one; none: no
    control, the explanation itself."""
    selection: SelectionConfig = SelectionConfig()
    """Which explanations become training rows; may change for explanations that are sampled already."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models it runs, by their section's name."""
        return {"teacher": self.teacher} | ({} if self.student is None else {"student": self.student})

    def path_faults(self) -> list[str]:
        faults = []
        if self.student is not None:
            faults += tokenizer_faults(self.teacher, {"student": self.student}, self.reward)
        if self.teacher_checkpoint is not None and not (self.teacher_checkpoint / "manifest.json").is_file():
            faults.append(
                f"teacher_checkpoint: {self.teacher_checkpoint} holds no checkpoint (no manifest.json); give a folder"
                " `checkpoints/step-N` of a run"
            )
        return [*faults, *data_faults("data", self.data), *engine_faults(self.rollout), *super().path_faults()]

    def faults(self, shapes: Shapes) -> list[str]:
        # A student may read less than its teacher: what is too long for it is collected without a reward.
        teacher = {name: shape for name, shape in shapes.items() if name == "teacher"}
        prompt, completion = self.prompts.max_prompt_tokens, self.rollout.max_completion_tokens
        return [
            *super().faults(shapes),
            *budget_faults(teacher, prompt, completion, section="rollout"),
            *rollout_faults(self.rollout, self.teacher, shapes.get("teacher"), self.world_size),
            *ahead_faults(self.rollout, None),
            *not_scoring_faults("teacher", self.teacher.fp8, "sampled"),
            *_selection_faults(self),
        ]

    def plan(self, shapes: Shapes) -> Plan:
        num_rows = count_rows(self.data)
        questions = self.questions_per_part if num_rows is None else min(self.questions_per_part, num_rows)
        per_part = questions * self.num_explanations
        numbers = [("explanations of each question", self.num_explanations)]
        if num_rows is not None:
            numbers += [
                ("questions, at most", num_rows),
                ("explanations, at most", num_rows * self.num_explanations),
                ("saved parts", math.ceil(num_rows / self.questions_per_part)),
            ]
        numbers += [
            ("explanations in a saved part", per_part),
            ("sampled tokens per part, at most", per_part * self.rollout.max_completion_tokens),
        ]
        for name, model in self.models.items():
            share = math.ceil(per_part / replicas(model, self.world_size))
            numbers.append((f"{name} sequences per data-parallel rank and part, at most", share))
        return Plan(tuple(numbers), frozen_plans(self.models, shapes, self.world_size))


def _selection_faults(config: CollectConfig) -> list[str]:
    selection, share, faults = config.selection, config.share, []
    if share is not None and share.index >= share.count:
        faults.append(
            f"share.index={share.index}: counts from 0, so it must be below share.count={share.count};"
            f" nearest valid: {share.count - 1}"
        )
    if share is not None and config.control == "other_question":
        faults.append("control=other_question: takes explanations of all questions; leave share out")
    if selection.rule == "best_of_n" and config.num_explanations == 1:
        faults.append(
            "num_explanations=1: leaves selection.rule=best_of_n nothing to choose from; set num_explanations=8, or"
            " rule=first"
        )
    if config.student is not None:
        return faults
    without_effect = {
        "selection.rule=best_of_n": selection.rule == "best_of_n",
        f"control={config.control}": config.control != "none",
        "reward": config.reward != RewardConfig(),
        "scoring": config.scoring != ScoringConfig(),
    }
    return faults + [
        f"{setting}: explanations are scored only by a student; set student.model, or leave it out"
        for setting, is_set in without_effect.items()
        if is_set
    ]
