"""Training: rows and their order, GRPO, optimizer and schedule, checkpoints; with the rules within these sections.

A rule is a function that returns one line per fault, naming key, value and remedy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.provider import export_fault
from megatron_rlt.config.section import (
    ByteCount,
    Count,
    FilePath,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
)


class DataConfig(Section):
    """Where training rows come from and in which order."""

    path: FilePath
    """Folder of webdataset shards written by `prepare`, or one JSONL file (sharded into the run folder first)."""
    shuffle_buffer_size: PositiveInt = 4096
    """Rows held per rank for shuffling; 1 keeps the shards' order."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loader processes per rank; 0 loads in the trainer's own process."""


class ReferenceConfig(Section):
    """The reference model: the policy's start, frozen, updated by an exponential moving average of the policy."""

    beta: PositiveFloat = 0.04
    """Weight of the k3 KL to the reference in the loss."""
    sync_steps: PositiveInt | None = 32
    """RL steps between two updates of the reference; None: never updated."""
    mix: Fraction = 0.9
    """Share of the policy when the reference is updated: reference = mix x policy + (1 - mix) x reference."""
    offload: bool = False
    """Offload the reference's weights to host memory while unused; each use then costs a copy to the GPU."""


class GrpoConfig(Section):
    """Group-relative policy optimisation; the defaults are the paper's."""

    questions_per_step: Count = 16
    """Questions per RL step, over all ranks."""
    group_size: Annotated[int, Field(ge=2, le=2**20)] = 64
    """Completions sampled per question."""
    max_tokens_per_pack: PositiveInt = 16384
    """Tokens packed into one forward-backward pass; a longer completion gets a pass of its own. Memory depends on it,
    the loss does not."""
    micro_batch_size: PositiveInt | None = None
    """Most completions packed into one forward-backward pass; null: as many as fit the tokens."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps per RL step, each on an equal share of the groups."""
    clip_low: PositiveFloat | None = None
    """Lower clip: the ratio is clamped to >= 1 - clip_low; None: not clamped. Needs updates_per_batch above 1."""
    clip_high: PositiveFloat | None = None
    """Upper clip: the ratio is clamped to <= 1 + clip_high; None: not clamped. DAPO sets it above clip_low (0.28).
    Needs updates_per_batch above 1."""
    reference: ReferenceConfig | None = ReferenceConfig()
    """KL to a reference model in the loss; null: no KL and no reference model."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """Loss over tokens: mean per completion, then over completions (paper); mean over all tokens of the batch (DAPO);
    or sum per completion over the token budget (Dr.GRPO, with normalize_std false)."""
    mask_truncated: bool = False
    """Leave completions that ran out of tokens out of the loss (DAPO); they still count in their group's mean."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation."""
    std_epsilon: PositiveFloat = 1e-4
    """Added to the standard deviation before dividing."""

    @property
    def beta(self) -> float:
        """Weight of the KL to the reference in the loss; 0 without a reference."""
        return 0.0 if self.reference is None else self.reference.beta


class OptimizerConfig(Section):
    """AdamW on Megatron's distributed optimizer."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate to which a decaying schedule falls; it would be reached one step after the last."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all optimizer steps during which the rate rises from 0, which the first of them has."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of Adam."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices, embedding and output layer included; norms and biases have none."""
    clip_grad: PositiveFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    max_skipped_steps: PositiveInt = 5
    """Consecutive updates without effect, since the gradient was not finite or no completion was in the loss, after
    which the run stops."""


ExportKind = Literal["hf", "megatron", "nemo", "bridge"]
Reshardable = Literal["full", "tp_pp"]


class CheckpointConfig(Section):
    """When training state is saved and how much of it is kept."""

    interval_steps: PositiveInt = 25
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; an older one is removed once a newer one is complete."""
    reshardable: Reshardable = "full"
    """Layouts in which a checkpoint can be resumed. full: all; a save gathers the optimizer over data parallelism, in
    host memory 12 bytes per weight of each rank's shard. tp_pp: those with the same tp and pp; each rank saves its own
    part of the optimizer, and nothing is gathered."""
    background: bool = False
    """Write checkpoints while training goes on: a save copies to host memory what each rank writes, and the rest is
    done by a thread."""
    export: list[ExportKind] = Field(default=["hf"])
    """Kinds of folders that the final weights are exported as, each under its name in the run folder; []: none."""
    max_shard_bytes: ByteCount = 5_000_000_000
    """Largest file of those folders, in bytes."""


def export_faults(checkpoint: CheckpointConfig, trained: Architecture | None) -> list[str]:
    """Kinds of folders that cannot express the trained model."""
    if trained is None:
        return []
    faults = ((kind, export_fault(trained, kind)) for kind in checkpoint.export)
    return [f"checkpoint.export: {kind}: {fault}" for kind, fault in faults if fault is not None]


def grpo_faults(grpo: GrpoConfig) -> list[str]:
    """Faults within the section `grpo`."""
    faults = []
    if grpo.clip_low is not None and grpo.clip_low >= 1:
        faults.append(
            f"grpo.clip_low={grpo.clip_low:g}: the lower ratio bound 1 - clip_low must stay above 0;"
            " use a value below 1, such as 0.2, or null for no clipping"
        )
    clips = [name for name in ("clip_low", "clip_high") if dict(grpo)[name] is not None]
    if not faults and clips and grpo.updates_per_batch == 1:
        faults.append(
            f"grpo.{clips[0]}={dict(grpo)[clips[0]]:g}: has no effect with updates_per_batch=1, where the ratio is"
            " always 1; set updates_per_batch=2 or more, or leave it out"
        )
    reference = grpo.reference
    if reference is not None and reference.sync_steps is None and reference.mix != ReferenceConfig().mix:
        faults.append(
            f"grpo.reference.mix={reference.mix:g}: has no effect with sync_steps=null, which never updates the"
            " reference; set sync_steps, or leave mix out"
        )
    return faults


def optimizer_faults(optimizer: OptimizerConfig) -> list[str]:
    """Faults within the section `optimizer`."""
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


def num_warmup_updates(settings: OptimizerConfig, updates: int) -> int:
    """Optimizer steps with a rising rate, of `updates` in all; at least one step runs at the peak."""
    return min(round(settings.warmup_fraction * updates), updates - 1)
