"""The plan of a run: numbers that follow from its configuration, parameters and bytes of every model's fullest rank.

Pure arithmetic. What depends on the data (activations, KV caches, lengths) is not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import saved_bytes
from megatron_rlt.config.models import ModelConfig, Shapes, data_parallel_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4  # accumulated and reduced in fp32 whatever the weights' precision
OPTIMIZER_BYTES = {"float32": 8, "bfloat16": 12}  # Adam's two fp32 moments, and a main copy beside bf16 weights


Use = Literal["trained", "trained with reference", "frozen"]


@dataclass(frozen=True)
class ModelPlan:
    """One model's layout and what its fullest rank holds."""

    name: str
    layout: str  # "tp 2 x pp 1 x dp 1, sp"; "offloaded", "fp8 blockwise" where it is
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


def num_parameters(shape: Architecture) -> int:
    """Parameters of the whole model as published."""
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return embeddings + shape.num_layers * sum(_layer_parameters(shape)) + shape.hidden_size


def rank_parameters(shape: Architecture, *, tp: int, pp: int, stage: int) -> int:
    """Parameters of a rank: an equal share of the layers, embedding on the first stage, output layer on the last.

    The vocabulary is padded to a multiple of tp. A tied last stage holds a copy of the embedding.
    """
    split, whole = _layer_parameters(shape)
    parameters = shape.num_layers // pp * (split // tp + whole)
    table = math.ceil(shape.vocab_size / tp) * shape.hidden_size
    is_first, is_last = stage == 0, stage == pp - 1
    tables = 1 if is_first and is_last and shape.tied_embeddings else int(is_first) + int(is_last)
    return parameters + tables * table + (shape.hidden_size if is_last else 0)


def max_rank_parameters(shape: Architecture, *, tp: int, pp: int) -> int:
    """Parameters of the fullest rank: the last stage has the final norm beside the output layer."""
    return rank_parameters(shape, tp=tp, pp=pp, stage=pp - 1)


def _layer_parameters(shape: Architecture) -> tuple[int, int]:
    """Parameters of one layer that tensor parallelism splits, and those every rank holds."""
    query_size, key_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * shape.hidden_size * query_size + 2 * shape.hidden_size * key_size
    bias = query_size + 2 * key_size if shape.qkv_bias else 0
    norms = 2 * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)
    return attention + bias + 3 * shape.hidden_size * shape.ffn_size, norms


def model_plan(name: str, model: ModelConfig, shape: Architecture, world_size: int, *, use: Use) -> ModelPlan:
    layout, dp = model.layout, replicas(model, world_size)
    parameters = max_rank_parameters(shape, tp=layout.tp, pp=layout.pp)
    trained = parameters if use != "frozen" else 0
    copies = 2 if use == "trained with reference" else 1
    saved = 0 if model.fp8 is None else saved_bytes(model.fp8, shape, tp=layout.tp, pp=layout.pp, stage=layout.pp - 1)
    return ModelPlan(
        name=name,
        layout=f"tp {layout.tp} x pp {layout.pp}{f' x cp {layout.cp}' if layout.cp > 1 else ''} x dp {dp}"
        f"{', sp' if layout.sp else ''}"
        f"{', offloaded' if model.offload else ''}"
        f"{'' if model.fp8 is None else f', fp8 {model.fp8.recipe}'}",
        num_parameters=num_parameters(shape),
        max_rank_parameters=parameters,
        weight_bytes=copies * parameters * DTYPE_BYTES[model.dtype] - saved,
        gradient_bytes=trained * GRADIENT_BYTES,
        # The distributed optimizer's share; its padding to bucket boundaries is below a kilobyte and not counted.
        optimizer_bytes=math.ceil(trained / (layout.cp * dp)) * OPTIMIZER_BYTES[model.dtype],
    )


def frozen_plans(models: Mapping[str, ModelConfig], shapes: Shapes, world_size: int) -> tuple[ModelPlan, ...]:
    """The plans of models none of which is trained."""
    return tuple(model_plan(name, model, shapes[name], world_size, use="frozen") for name, model in models.items())


def most_packs(num_sequences: int, *, longest: int, max_tokens: int, max_sequences: int | None) -> int:
    """Packs that first-fit needs at most for sequences of up to `longest` tokens.

    A pack takes any further sequence until it holds this many, so only one pack can stay below.
    """
    fitting = max(1, max_tokens // longest)
    return math.ceil(num_sequences / (fitting if max_sequences is None else min(fitting, max_sequences)))


def replicas(model: ModelConfig, world_size: int) -> int:
    dp = data_parallel_size(model.layout, world_size)
    assert dp is not None, "the rules check layouts before anything is planned"
    return dp
