"""Models on disk and their parallel layouts: sections, and the rules between them, model shapes and number of ranks.

A rule is a function that returns one line per fault, naming key, value and remedy; nothing is raised, so that a user
sees all faults at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from megatron_rlt.config.architecture import Architecture, position_limit
from megatron_rlt.config.fp8 import Fp8Config, Scales, fp8_faults, scales_faults
from megatron_rlt.config.section import (
    Count,
    FilePath,
    PositiveInt,
    Section,
)

Shapes = Mapping[str, Architecture]  # by the model's section name; a model that could not be read is left out
PAPER_TEMPERATURE = 0.7  # arXiv 2506.08388, of sampling and of log-probs

# Rows and vocabulary entries of a block of logits, by device: a CPU's cache holds 4 MiB; on a GPU every block costs a
# dozen kernel launches, and 256 MiB of logits make them cheap.
BLOCKS = {"cpu": (1024, 1024), "cuda": (4096, 16384)}


class LayoutConfig(Section):
    """How one model is split over the ranks; ranks beyond tp x pp x cp are data parallel."""

    tp: Count = 1
    """Tensor-parallel size: ranks that share every layer."""
    pp: Count = 1
    """Pipeline-parallel size: stages into which the layers are split."""
    sp: bool = False
    """Sequence parallelism: split activations between layers over the tensor-parallel ranks; needs tp > 1."""
    cp: Count = 1
    """Context-parallel size: ranks that share the tokens of every sequence. While sampling they are data parallel."""


class ModelConfig(Section):
    """A model on disk and how it runs here."""

    model: FilePath
    """Model folder with its tokenizer: Hugging Face, Megatron, NeMo 2.0, Megatron-Bridge, or a run's checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; sums over tokens and log-sum-exp are float32 in any case."""
    fp8: Fp8Config | None = None
    """FP8 linear layers of a frozen model that scores; null: none. On a CPU they are emulated."""
    layout: LayoutConfig = LayoutConfig()
    """Parallel layout of this model; teacher and student may differ."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: none, core attention only, or every layer."""
    offload: bool = False
    """Offload a frozen model's weights to host memory while unused; each use then costs a copy to the GPU."""


class ScoringConfig(Section):
    """Log-prob passes without gradient: student, reference, and the policy before its update."""

    max_tokens_per_pack: PositiveInt = 16384
    """Tokens packed into one forward pass; a longer sequence gets a pass of its own."""
    vocab_block: PositiveInt | None = None
    """Vocabulary entries whose logits exist at one time; null: 1024 on a CPU, 16384 on a GPU."""
    row_block: PositiveInt | None = None
    """Tokens whose logits exist at one time; null: 1024 on a CPU, 4096 on a GPU."""


def offload_faults(name: str, trained: ModelConfig) -> list[str]:
    """A trained model that is to be offloaded."""
    if not trained.offload:
        return []
    return [
        f"{name}.offload=true: only frozen models are offloaded; gradients and optimizer of a trained model keep its"
        " weights on the GPU"
    ]


def models_fp8_faults(models: Mapping[str, ModelConfig], shapes: Shapes) -> list[str]:
    """Broken rules of the models' FP8 sections."""
    faults = []
    for name, model in models.items():
        if model.fp8 is not None:
            layout = model.layout
            faults += fp8_faults(
                name, model.fp8, shapes.get(name), dtype=model.dtype, tp=layout.tp, sp=layout.sp and layout.tp > 1
            )
    return faults + scales_faults({name: model.fp8 for name, model in models.items()})


def block_scales(models: Mapping[str, ModelConfig]) -> Scales | None:
    """The one kind of scales of the job's blockwise FP8 models; None without such a model."""
    sections = (model.fp8 for model in models.values())
    return next((fp8.scales for fp8 in sections if fp8 is not None and fp8.recipe == "blockwise"), None)


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


def _split_faults(name: str, layout: LayoutConfig, shape: Architecture) -> list[str]:
    faults = []
    split = {
        "attention heads": shape.num_heads,
        "key-value heads": shape.num_kv_heads,
        "feed-forward size": shape.ffn_size,
    }
    uneven = [f"{what} {size}" for what, size in split.items() if size % layout.tp != 0]
    if uneven:
        valid = nearest_divisors(layout.tp, math.gcd(*split.values()))
        faults.append(f"{name}.layout.tp={layout.tp}: must divide {' and '.join(uneven)}; nearest valid: {valid}")
    if shape.num_layers % layout.pp != 0:
        valid = nearest_divisors(layout.pp, shape.num_layers)
        faults.append(f"{name}.layout.pp={layout.pp}: must divide layers {shape.num_layers}; nearest valid: {valid}")
    return faults


def budget_faults(shapes: Shapes, prompt: int, completion: int, *, section: str) -> list[str]:
    """Models whose positions do not hold a prompt and a completion of `section`, each as long as it may be."""
    limit = f"{section}.max_completion_tokens"
    return length_faults(
        shapes,
        prompt + completion,
        what=f"prompts.max_prompt_tokens + {limit} = {prompt} + {completion} = {prompt + completion}",
        remedy=f"lower {limit} or prompts.max_prompt_tokens",
    )


def length_faults(shapes: Shapes, tokens: int, *, what: str, remedy: str) -> list[str]:
    """Models with fewer positions than `tokens`."""
    return [
        f"{what} tokens: longer than {name}.model's {limit} positions; {remedy} by at least {tokens - limit}"
        for name, limit in ((name, position_limit(shape)) for name, shape in shapes.items())
        if tokens > limit
    ]


def nearest_divisors(value: int, number: int) -> str:
    """The divisors of `number` next to `value`, below and above it, as text."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    divisors = sorted({*small, *(number // candidate for candidate in small)})
    below = [candidate for candidate in divisors if candidate < value][-1:]
    above = [candidate for candidate in divisors if candidate > value][:1]
    return _joined(below + above)


def _joined(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))
