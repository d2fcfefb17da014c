"""TODO megatron_rlt/config/commands/train.py."""

from __future__ import annotations

import math
from itertools import chain
from typing import ClassVar

from pydantic import model_validator

from megatron_rlt.config.commands.job import RlConfig
from megatron_rlt.config.commands.path_rules import _data_faults, _model_faults, _run_faults, _tokenizer_faults
from megatron_rlt.config.mismatch import mismatch_faults
from megatron_rlt.config.plan import Plan, Use, _model_plan, _replicas, num_warmup_updates
from megatron_rlt.config.rollout import ahead_faults, rollout_faults
from megatron_rlt.config.rules import (
    Shapes,
    _divisors,
    _length_faults,
    _nearest,
    _optimizer_faults,
    _residency_faults,
    data_parallel_size,
    layout_faults,
)
from megatron_rlt.config.sections import (
    GrpoConfig,
    ModelConfig,
    PositiveFloat,
    RewardConfig,
    StudentsConfig,
)


class TrainConfig(RlConfig):
    """`megatron-rlt train`: RL of a teacher with the RLT reward."""

    policy_name: ClassVar[str] = "teacher"

    teacher: ModelConfig
    """The policy: it is trained."""
    student: ModelConfig
    """The frozen model whose predictions are the reward; the word `self` takes the teacher's section, that is its own
    frozen start."""
    students: StudentsConfig = StudentsConfig()
    """Further students, and what becomes of several rewards."""
    temperature: PositiveFloat = 0.7
    """Of sampling and of every log-prob: teacher, student, reference."""
    reward: RewardConfig = RewardConfig()
    """RLT reward."""

    @model_validator(mode="before")
    @classmethod
    def _read_self(cls, values: object) -> object:
        """`student: self` is the teacher's section: its folder holds the start, also when a run resumes."""
        if isinstance(values, dict) and values.get("student") == "self" and "teacher" in values:
            return {**values, "student": values["teacher"]}
        return values

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The teacher and all students."""
        extra = {f"students.extra.{name}": model for name, model in self.students.extra.items()}
        return {"teacher": self.teacher, "student": self.student} | extra


def train_faults(config: RlConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `train`, whatever its reward."""
    tokens = config.prompts.max_prompt_tokens + config.rollout.max_completion_tokens
    return [
        *layout_faults(config.models, shapes, config.world_size),
        *_batch_faults(config),
        *_grpo_faults(config.grpo),
        *mismatch_faults(config.mismatch),
        *rollout_faults(
            config.rollout, config.models[config.policy_name], shapes.get(config.policy_name), config.world_size
        ),
        *ahead_faults(config.rollout, config.mismatch if isinstance(config, TrainConfig) else None),
        *_length_faults(
            shapes,
            tokens,
            what=f"prompts.max_prompt_tokens + rollout.max_completion_tokens = {config.prompts.max_prompt_tokens}"
            f" + {config.rollout.max_completion_tokens} = {tokens}",
            remedy="lower rollout.max_completion_tokens or prompts.max_prompt_tokens",
        ),
        *_optimizer_faults(config.optimizer),
        *_residency_faults(config.policy_name, config.models[config.policy_name]),
    ]


def students_faults(config: TrainConfig) -> list[str]:
    """Broken rules between `train`'s students."""
    students, faults = config.students, []
    names = ["student", *students.extra]
    if "student" in students.extra:
        faults.append("students.extra.student: the name belongs to the section `student`; give it another one")
    if not students.extra:
        defaults = StudentsConfig()
        without_effect = {
            f"students.reduction={students.reduction}": students.reduction != defaults.reduction,
            f"students.held_out={students.held_out}": students.held_out is not None,
        }
        faults += [
            f"{setting}: has no effect with one student; name others under students.extra, or leave it out"
            for setting, is_set in without_effect.items()
            if is_set
        ]
    elif students.held_out is not None and students.held_out not in names:
        faults.append(f"students.held_out={students.held_out}: must be one of {', '.join(names)}, or null")
    return faults


def _batch_faults(config: RlConfig) -> list[str]:
    grpo, faults = config.grpo, []
    if grpo.questions_per_step % grpo.updates_per_batch != 0:
        valid = _nearest(grpo.updates_per_batch, _divisors(grpo.questions_per_step))
        faults.append(
            f"grpo.updates_per_batch={grpo.updates_per_batch}: must divide questions_per_step"
            f" {grpo.questions_per_step}; nearest valid: {valid}"
        )
    for name, model in config.models.items():
        parts = grpo.updates_per_batch if name == config.policy_name else 1
        dp = data_parallel_size(model.layout, config.world_size)
        completions = grpo.questions_per_step * grpo.group_size // parts
        if dp is not None and completions < dp:
            per_question = grpo.group_size / parts
            faults.append(
                f"grpo.questions_per_step={grpo.questions_per_step}: x group_size {grpo.group_size} / updates {parts} ="
                f" {completions} completions must give each of the {name}'s {dp} data-parallel ranks at least one;"
                f" nearest valid: {math.ceil(dp / per_question)}"
            )
    return faults


def _grpo_faults(grpo: GrpoConfig) -> list[str]:
    faults = []
    if grpo.clip_low is not None and grpo.clip_low >= 1:
        faults.append(
            f"grpo.clip_low={grpo.clip_low:g}: the lower ratio bound 1 - clip_low must stay above 0;"
            " use a value below 1, such as 0.2, or null for no clipping"
        )
    defaults = GrpoConfig.model_fields
    if grpo.beta == 0 and grpo.reference_sync_steps not in (None, defaults["reference_sync_steps"].default):
        faults.append(
            f"grpo.reference_sync_steps={grpo.reference_sync_steps}: has no effect with grpo.beta=0, which keeps no"
            " reference model; set beta > 0 or leave reference_sync_steps out"
        )
    mixes = grpo.beta > 0 and grpo.reference_sync_steps is not None
    if not mixes and grpo.reference_mix != defaults["reference_mix"].default:
        faults.append(
            f"grpo.reference_mix={grpo.reference_mix:g}: has no effect without a reference that is synced;"
            " set beta > 0 and reference_sync_steps, or leave reference_mix out"
        )
    if grpo.beta == 0 and grpo.reference_residency != defaults["reference_residency"].default:
        faults.append(
            f"grpo.reference_residency={grpo.reference_residency}: has no effect with grpo.beta=0, which keeps no"
            " reference model; set beta > 0 or leave reference_residency out"
        )
    return faults


def train_path_faults(config: TrainConfig) -> list[str]:
    """Broken rules about the files of `train`."""
    students = {name: model for name, model in config.models.items() if name != "teacher"}
    return [
        *_model_faults(config.models),
        *chain(*(_tokenizer_faults(*one, teacher=config.teacher, reward=config.reward) for one in students.items())),
        *_data_faults("data.path", config.data.path),
        *_run_faults(config),
    ]


def plan_train(config: RlConfig, shapes: Shapes) -> Plan:
    """The plan of `train`, whatever its reward; the configuration must break no rule."""
    grpo, policy = config.grpo, config.policy_name
    completions = grpo.questions_per_step * grpo.group_size
    per_update = completions // grpo.updates_per_batch
    replicas = {name: _replicas(model, config.world_size) for name, model in config.models.items()}
    tokens = config.prompts.max_prompt_tokens + config.rollout.max_completion_tokens
    updates = num_updates(config)
    numbers = (
        ("groups per step", grpo.questions_per_step),
        ("completions per step", completions),
        ("completions per optimizer step", per_update),
        *(
            (f"{name} sequences per data-parallel rank and step, at most", math.ceil(completions / dp))
            for name, dp in replicas.items()
        ),
        (
            "micro-batches per rank and step",
            grpo.updates_per_batch * math.ceil(math.ceil(per_update / replicas[policy]) / grpo.micro_batch_size),
        ),
        ("optimizer steps", updates),
        ("warm-up steps", num_warmup_updates(config.optimizer, updates)),
        (f"{policy} tokens per step, at most", completions * tokens),
    )
    trained: Use = "trained with reference" if grpo.beta > 0 else "trained"
    models = tuple(
        _model_plan(name, model, shapes[name], config.world_size, use=trained if name == policy else "frozen")
        for name, model in config.models.items()
    )
    return Plan(numbers, models)


def num_updates(config: RlConfig) -> int:
    """Optimizer steps of a whole RL run."""
    return config.num_steps * config.grpo.updates_per_batch
