"""`sft`: supervised training of one model on rows with a reasoning trace."""

from __future__ import annotations

import math
from typing import Literal

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.fp8 import not_scoring_faults
from megatron_rlt.config.models import (
    ModelConfig,
    ScoringConfig,
    Shapes,
    data_parallel_size,
    length_faults,
    offload_faults,
)
from megatron_rlt.config.paths import count_rows, data_faults
from megatron_rlt.config.plan import Plan, model_plan, most_packs, replicas
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.section import (
    Count,
    FilePath,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megatron_rlt.config.training import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    export_faults,
    num_warmup_updates,
    optimizer_faults,
)


class EvaluationLossConfig(Section):
    """Loss on rows that are not trained on."""

    data: FilePath
    """Held-out rows with question, solution and reasoning_trace: shards written by `prepare`, or one JSONL file."""
    interval_steps: PositiveInt = 25
    """Steps between evaluations; the last step is always evaluated."""


class SftConfig(JobConfig):
    """Train one model on rows with a reasoning trace: a teacher's warm-up or a student's distillation."""

    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Rows with question, solution and reasoning_trace."""
    evaluation: EvaluationLossConfig | None = None
    """Loss on held-out rows, logged as evaluation_loss; None: not evaluated. It does not change the training."""
    role: Literal["teacher", "student"] = "teacher"
    """Sequence format: the teacher's (loss on the explanation) or the student's (loss on explanation and solution)."""
    loss_on: Literal["explanation_and_solution", "assistant_turn"] = "explanation_and_solution"
    """Tokens of the student's sequence in the loss: from the first of the explanation to the end-of-turn token, or the
    whole assistant turn with the tag that opens the explanation."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompts, prompt length."""
    max_tokens: PositiveInt = 16384
    """Longest whole sequence in tokens; a longer row is rejected by its id."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; None derives them from num_epochs."""
    num_epochs: PositiveFloat = 10.0
    """Passes over the data, where num_steps is None."""
    global_batch_size: Count = 16
    """Rows per optimizer step, over all ranks."""
    max_tokens_per_pack: PositiveInt = 16384
    """Tokens packed into one forward-backward pass; a longer row gets a pass of its own. Memory depends on it, the loss
    does not."""
    micro_batch_size: PositiveInt | None = None
    """Most rows packed into one forward-backward pass; null: as many as fit the tokens."""
    scoring: ScoringConfig = ScoringConfig()
    """Block sizes of the output layer."""
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=1e-5, schedule="cosine", warmup_fraction=0.05, beta2=0.95, weight_decay=1e-4
    )
    """AdamW and the schedule of its learning rate; the defaults are the paper's warm-up."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The model that is trained."""
        return {"model": self.model}

    def num_updates(self, *, num_rows: int | None) -> int:
        """Optimizer steps of the whole run: `num_steps`, or enough full batches for `num_epochs`."""
        if self.num_steps is not None:
            return self.num_steps
        assert num_rows is not None, "num_steps is derived from num_epochs and the number of rows"
        return max(1, math.ceil(self.num_epochs * num_rows / self.global_batch_size))

    def path_faults(self) -> list[str]:
        faults = data_faults("data.path", self.data.path)
        if self.evaluation is not None:
            held_out = self.evaluation.data
            faults += data_faults("evaluation.data", held_out)
            if held_out.resolve() == self.data.path.resolve():
                faults.append(
                    f"evaluation.data: {held_out} is data.path itself, so nothing is held out; give other rows"
                )
        return faults + super().path_faults()

    def faults(self, shapes: Shapes) -> list[str]:
        faults = super().faults(shapes)
        dp = data_parallel_size(self.model.layout, self.world_size)
        if dp is not None and self.global_batch_size < dp:
            faults.append(
                f"global_batch_size={self.global_batch_size}: each of the {dp} data-parallel ranks"
                f" (world_size / (tp x pp x cp)) needs at least one row; nearest valid: {dp}"
            )
        default_epochs = SftConfig.model_fields["num_epochs"].default
        if self.num_steps is not None and self.num_epochs != default_epochs:
            faults.append(
                f"num_epochs={self.num_epochs:g}: has no effect beside num_steps={self.num_steps}; set one of the two"
            )
        if self.role == "teacher" and self.loss_on != SftConfig.model_fields["loss_on"].default:
            faults.append(
                f"loss_on={self.loss_on}: has no effect with role=teacher, whose loss is on the explanation;"
                " set role=student, or leave loss_on out"
            )
        return [
            *faults,
            *offload_faults("model", self.model),
            *not_scoring_faults("model", self.model.fp8, "trained"),
            *length_faults(shapes, self.max_tokens, what=f"max_tokens={self.max_tokens}", remedy="lower max_tokens"),
            *optimizer_faults(self.optimizer),
            *export_faults(self.checkpoint, shapes.get("model")),
        ]

    def plan(self, shapes: Shapes) -> Plan:
        rows_per_rank = math.ceil(self.global_batch_size / replicas(self.model, self.world_size))
        numbers = [
            ("rows per optimizer step", self.global_batch_size),
            ("rows per data-parallel rank and step, at most", rows_per_rank),
            (
                "micro-batches per rank and step, at most",
                most_packs(
                    rows_per_rank,
                    longest=self.max_tokens,
                    max_tokens=self.max_tokens_per_pack,
                    max_sequences=self.micro_batch_size,
                ),
            ),
            ("tokens per step, at most", self.global_batch_size * self.max_tokens),
        ]
        num_rows = count_rows(self.data.path)
        if self.num_steps is not None or num_rows is not None:
            updates = self.num_updates(num_rows=num_rows)
            numbers += [("optimizer steps", updates), ("warm-up steps", num_warmup_updates(self.optimizer, updates))]
        return Plan(tuple(numbers), (model_plan("model", self.model, shapes["model"], self.world_size, use="trained"),))
