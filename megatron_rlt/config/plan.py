"""Numbers that follow from a configuration: batch arithmetic, schedule, layouts, parameters and bytes of every rank.

Pure arithmetic, exact where the configuration decides alone. What depends on the data (activations, key-value
caches, lengths) is not guessed here. The one home of these formulas: jobs and rooms that need a number take it
from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_rlt.config.architecture import ModelShape
from megatron_rlt.config.rules import data_parallel_size
from megatron_rlt.config.sections import ModelConfig, OptimizerConfig

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


# Gradients are accumulated and reduced in fp32 whatever the weights' precision.
_GRADIENT_BYTES = 4


# Adam's two fp32 moments; bf16 weights have an fp32 main copy beside them.
_OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}


Use = Literal["trained", "trained with reference", "frozen"]


@dataclass(frozen=True)
class ModelPlan:
    """One model's layout and what its fullest rank holds."""

    name: str
    layout: str  # "tp 2 x pp 1 x dp 1, sp"; where it lives, unless on the device
    num_parameters: int  # of the whole model as published, vocabulary unpadded
    max_rank_parameters: int  # on the fullest rank, vocabulary padded to tp
    weight_bytes: int  # of that rank, a reference model's weights included
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Plan:
    """Every derived number of one run: named values and the models' plans."""

    numbers: tuple[tuple[str, int], ...]
    models: tuple[ModelPlan, ...]


def num_warmup_updates(settings: OptimizerConfig, updates: int) -> int:
    """Optimizer steps with a rising rate; at least one step runs at the peak."""
    return min(round(settings.warmup_fraction * updates), updates - 1)


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model as published."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return embeddings + shape.num_layers * sum(_layer_parameters(shape)) + shape.hidden_size


def max_rank_parameters(shape: ModelShape, *, tp: int, pp: int) -> int:
    """Parameters of the fullest rank: an equal share of the layers, and the embedding or output layer at an end."""
    split, whole = _layer_parameters(shape)
    layers = shape.num_layers // pp * (split // tp + whole)
    table = math.ceil(shape.vocab_size / tp) * shape.hidden_size
    if pp > 1:
        return layers + table + shape.hidden_size  # the last stage: output layer (a copy if tied) and final norm
    return layers + table * (1 if shape.tied_embeddings else 2) + shape.hidden_size


def _layer_parameters(shape: ModelShape) -> tuple[int, int]:
    """Parameters of one layer that tensor parallelism splits, and those every rank holds."""
    query_size, key_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * shape.hidden_size * query_size + 2 * shape.hidden_size * key_size
    bias = query_size + 2 * key_size if shape.qkv_bias else 0
    norms = 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)
    return attention + bias + 3 * shape.hidden_size * shape.ffn_size, norms


def _model_plan(name: str, model: ModelConfig, shape: ModelShape, world_size: int, *, use: Use) -> ModelPlan:
    layout, dp = model.layout, _replicas(model, world_size)
    parameters = max_rank_parameters(shape, tp=layout.tp, pp=layout.pp)
    trained = parameters if use != "frozen" else 0
    copies = 2 if use == "trained with reference" else 1
    return ModelPlan(
        name=name,
        layout=f"tp {layout.tp} x pp {layout.pp}{f' x cp {layout.cp}' if layout.cp > 1 else ''} x dp {dp}"
        f"{', sp' if layout.sp else ''}"
        f"{', host between turns' if model.residency == 'host' else ''}",
        num_parameters=num_parameters(shape),
        max_rank_parameters=parameters,
        weight_bytes=copies * parameters * _DTYPE_BYTES[model.dtype],
        gradient_bytes=trained * _GRADIENT_BYTES,
        # The distributed optimizer's share; its padding to bucket boundaries is below a kilobyte and not counted.
        optimizer_bytes=math.ceil(trained / (layout.cp * dp)) * _OPTIMIZER_BYTES[model.dtype],
    )


def _replicas(model: ModelConfig, world_size: int) -> int:
    dp = data_parallel_size(model.layout, world_size)
    assert dp is not None, "layouts are checked by the rules before anything is planned"
    return dp
