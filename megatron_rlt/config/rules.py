"""Rules across sections and between a configuration and its models, as lines that name rule, values and remedy.

A function returns one line for every rule that is broken, an empty list where all hold; nothing is raised, so
that a user sees all faults at once. Files and folders are left to `path_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from megatron_rlt.config.evaluation_sets import data_faults
from megatron_rlt.config.jobs import CollectConfig, EvaluateConfig, RlConfig, ScoreConfig, SftConfig, TrainConfig
from megatron_rlt.config.mismatch_rules import mismatch_faults
from megatron_rlt.config.rollout_rules import ahead_faults, rollout_faults
from megatron_rlt.config.sections import (
    CountdownConfig,
    GrpoConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    ScoringConfig,
    StudentsConfig,
)
from megatron_rlt.config.shapes import ModelShape, position_limit
from megatron_rlt.config.solver import SolverConfig, VerifierConfig

Shapes = Mapping[str, ModelShape]  # by the model's section name; a model that could not be read is left out


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


def sft_faults(config: SftConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `sft`."""
    faults = layout_faults({"model": config.model}, shapes, config.world_size)
    dp = data_parallel_size(config.model.layout, config.world_size)
    if dp is not None and config.global_batch_size < dp:
        faults.append(
            f"global_batch_size={config.global_batch_size}: each of the {dp} data-parallel ranks"
            f" (world_size / (tp x pp x cp)) needs at least one row; nearest valid: {dp}"
        )
    default_epochs = SftConfig.model_fields["num_epochs"].default
    if config.num_steps is not None and config.num_epochs != default_epochs:
        faults.append(
            f"num_epochs={config.num_epochs:g}: has no effect beside num_steps={config.num_steps}; set one of the two"
        )
    if config.role == "teacher" and config.loss_on != SftConfig.model_fields["loss_on"].default:
        faults.append(
            f"loss_on={config.loss_on}: has no effect with role=teacher, whose loss is on the explanation;"
            " set role=student, or leave loss_on out"
        )
    what = f"max_tokens={config.max_tokens}"
    return [
        *faults,
        *_residency_faults("model", config.model),
        *_length_faults(shapes, config.max_tokens, what=what, remedy="lower max_tokens"),
        *_optimizer_faults(config.optimizer),
    ]


def _residency_faults(name: str, trained: ModelConfig) -> list[str]:
    if trained.residency == "resident":
        return []
    return [
        f"{name}.residency={trained.residency}: a model that is trained stays on the device, its gradients and"
        " optimizer hold its weights; only frozen models can live on the host"
    ]


def score_faults(config: ScoreConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `score`."""
    return layout_faults({"teacher": config.teacher, "student": config.student}, shapes, config.world_size)


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


def evaluate_faults(config: EvaluateConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `evaluate`."""
    sampling, faults = config.sampling, data_faults(config)
    if sampling.greedy and sampling.num_samples > 1:
        faults.append(
            f"sampling.num_samples={sampling.num_samples}: greedy answers to one question are all equal;"
            " set num_samples=1, or greedy=false to sample"
        )
    if config.model.layout.cp > 1:
        faults.append(
            f"model.layout.cp={config.model.layout.cp}: has no effect on answers that are only sampled, where"
            " context-parallel ranks are replicas like others; leave it out"
        )
    tokens = config.prompts.max_prompt_tokens + sampling.max_completion_tokens
    return [
        *layout_faults({"model": config.model}, shapes, config.world_size),
        *faults,
        *_length_faults(
            shapes,
            tokens,
            what=f"prompts.max_prompt_tokens + sampling.max_completion_tokens = {config.prompts.max_prompt_tokens}"
            f" + {sampling.max_completion_tokens} = {tokens}",
            remedy="lower sampling.max_completion_tokens or prompts.max_prompt_tokens",
        ),
        *_countdown_faults(config.countdown),
    ]


def data_parallel_size(layout: LayoutConfig, world_size: int) -> int | None:
    """Replicas of a model, `world_size / (tp x pp x cp)`; None where that is no whole number."""
    replicas, rest = divmod(world_size, _replica_ranks(layout))
    return replicas if rest == 0 else None


def _replica_ranks(layout: LayoutConfig) -> int:
    return layout.tp * layout.pp * layout.cp


def layout_faults(models: Mapping[str, ModelConfig], shapes: Shapes, world_size: int) -> list[str]:
    """Broken rules between layouts, model shapes and the number of ranks."""
    faults = []
    common = math.lcm(*(_replica_ranks(model.layout) for model in models.values()))
    for name, model in models.items():
        layout = model.layout
        if name in shapes:
            faults += _split_faults(name, layout, shapes[name])
        if layout.sp and layout.tp == 1:
            faults.append(
                f"{name}.layout.sp=true: sequence parallelism splits activations over tensor-parallel ranks and needs"
                f" tp > 1, got {name}.layout.tp=1; set sp=false or tp=2 or more"
            )
        if data_parallel_size(layout, world_size) is None:
            multiples = [common * max(world_size // common, 1), common * (world_size // common + 1)]
            faults.append(
                f"world_size={world_size}: must be a multiple of {name}.layout.tp x pp x cp = {layout.tp} x {layout.pp}"
                f" x {layout.cp} = {_replica_ranks(layout)}; nearest valid: {_joined(multiples)}"
            )
    return faults


def _split_faults(name: str, layout: LayoutConfig, shape: ModelShape) -> list[str]:
    faults = []
    split = {
        "attention heads": shape.num_heads,
        "key-value heads": shape.num_kv_heads,
        "feed-forward size": shape.ffn_size,
    }
    uneven = [f"{what} {size}" for what, size in split.items() if size % layout.tp != 0]
    if uneven:
        valid = _nearest(layout.tp, _divisors(math.gcd(*split.values())))
        faults.append(f"{name}.layout.tp={layout.tp}: must divide {' and '.join(uneven)}; nearest valid: {valid}")
    if shape.num_layers % layout.pp != 0:
        valid = _nearest(layout.pp, _divisors(shape.num_layers))
        faults.append(f"{name}.layout.pp={layout.pp}: must divide layers {shape.num_layers}; nearest valid: {valid}")
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


def _length_faults(shapes: Shapes, tokens: int, *, what: str, remedy: str) -> list[str]:
    return [
        f"{what} tokens: longer than {name}.model's {limit} positions; {remedy} by at least {tokens - limit}"
        for name, limit in ((name, position_limit(shape)) for name, shape in shapes.items())
        if tokens > limit
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


def _countdown_faults(countdown: CountdownConfig) -> list[str]:
    if countdown.smallest_target <= countdown.largest_target:
        return []
    return [
        f"countdown.smallest_target={countdown.smallest_target}: must not exceed"
        f" countdown.largest_target={countdown.largest_target}; nearest valid: {countdown.largest_target}"
    ]


def _optimizer_faults(optimizer: OptimizerConfig) -> list[str]:
    faults = []
    if optimizer.min_lr > optimizer.lr:
        faults.append(
            f"optimizer.min_lr={optimizer.min_lr:g}: must not exceed optimizer.lr={optimizer.lr:g};"
            f" nearest valid: {optimizer.lr:g}"
        )
    if optimizer.min_lr > 0 and optimizer.schedule == "constant":
        faults.append(
            f"optimizer.min_lr={optimizer.min_lr:g}: has no effect with optimizer.schedule=constant;"
            " use cosine or linear, or leave min_lr out"
        )
    return faults


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _nearest(value: int, valid: Iterable[int]) -> str:
    """The valid values on both sides of `value`, as text."""
    ordered = sorted(valid)
    below = [candidate for candidate in ordered if candidate < value][-1:]
    above = [candidate for candidate in ordered if candidate > value][:1]
    return _joined(below + above)


def _joined(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))
