"""TODO megatron_rlt/config/commands/sft.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.path_rules import _data_faults, _model_faults, _run_faults
from megatron_rlt.config.plan import Plan, _model_plan, _replicas, num_warmup_updates
from megatron_rlt.config.rules import (
    Shapes,
    _length_faults,
    _optimizer_faults,
    _residency_faults,
    data_parallel_size,
    layout_faults,
)
from megatron_rlt.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    ScoringConfig,
    Section,
)


class EvaluationLossConfig(Section):
    """Loss on rows that are not trained on."""

    data: Path
    """Held-out rows with question, solution and reasoning_trace: shards written by `prepare`, or one file of rows."""
    interval_steps: PositiveInt = 25
    """Steps between evaluations; the last step is always evaluated."""


class SftConfig(JobConfig):
    """`megatron-rlt sft`: supervised training of one model on rows with a `reasoning_trace`."""

    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Rows with question, solution and reasoning_trace."""
    evaluation: EvaluationLossConfig | None = None
    """Loss on held-out rows, logged as evaluation_loss; None: not evaluated. Training does not depend on it."""
    role: Literal["teacher", "student"] = "teacher"
    """Sequence format: the teacher's (loss on the explanation) or the student's (loss on explanation and solution)."""
    loss_on: Literal["explanation_and_solution", "assistant_turn"] = "explanation_and_solution"
    """Student's tokens in the loss: from the explanation's first to the end of turn, or also the tag that opens it."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    max_tokens: PositiveInt = 16384
    """Longest whole sequence; a longer row is rejected by name."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; None derives them from num_epochs."""
    num_epochs: PositiveFloat = 10.0
    """Passes over the data when num_steps is None."""
    global_batch_size: PositiveInt = 16
    """Rows of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Most rows packed into one forward-backward pass."""
    scoring: ScoringConfig = ScoringConfig()
    """Block sizes of the output layer."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-5, schedule="cosine", warmup_fraction=0.05, beta2=0.95, weight_decay=1e-4
    )
    """AdamW and its schedule; the defaults are the paper's warm-up."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""


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


def sft_path_faults(config: SftConfig) -> list[str]:
    """Broken rules about the files of `sft`."""
    faults = [*_model_faults({"model": config.model}), *_data_faults("data.path", config.data.path)]
    if config.evaluation is not None:
        held_out = config.evaluation.data
        faults += _data_faults("evaluation.data", held_out)
        if held_out.resolve() == config.data.path.resolve():
            faults.append(f"evaluation.data: {held_out} is data.path itself, so nothing is held out; give other rows")
    return [*faults, *_run_faults(config)]


def plan_sft(config: SftConfig, shapes: Shapes, *, num_rows: int | None) -> Plan:
    """The plan of `sft`.

    Args:
        num_rows: rows of the data set; None where unknown, then numbers that need it are left out.
    """
    dp = _replicas(config.model, config.world_size)
    rows_per_rank = math.ceil(config.global_batch_size / dp)
    numbers = [
        ("rows per optimizer step", config.global_batch_size),
        ("rows per data-parallel rank and step, at most", rows_per_rank),
        ("micro-batches per rank and step", math.ceil(rows_per_rank / config.micro_batch_size)),
        ("tokens per step, at most", config.global_batch_size * config.max_tokens),
    ]
    if config.num_steps is not None or num_rows is not None:
        updates = num_sft_updates(config, num_rows=num_rows)
        numbers += [("optimizer steps", updates), ("warm-up steps", num_warmup_updates(config.optimizer, updates))]
    model = _model_plan("model", config.model, shapes["model"], config.world_size, use="trained")
    return Plan(tuple(numbers), (model,))


def num_sft_updates(config: SftConfig, *, num_rows: int | None) -> int:
    """Optimizer steps of a whole supervised run: `num_steps`, or enough full batches for `num_epochs`."""
    if config.num_steps is not None:
        return config.num_steps
    assert num_rows is not None, "num_steps is derived from num_epochs and the number of rows"
    return max(1, math.ceil(config.num_epochs * num_rows / config.global_batch_size))
