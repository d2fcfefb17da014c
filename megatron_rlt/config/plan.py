"""Numbers that follow from a configuration: batch arithmetic, schedule, layouts, parameters and bytes of every rank.

Pure arithmetic, exact where the configuration decides alone. What depends on the data (activations, key-value
caches, lengths) is not guessed here. The one home of these formulas: jobs and rooms that need a number take it
from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_rlt.config.jobs import CollectConfig, EvaluateConfig, RlConfig, ScoreConfig, SftConfig
from megatron_rlt.config.rules import Shapes, data_parallel_size
from megatron_rlt.config.sections import ModelConfig, OptimizerConfig
from megatron_rlt.config.shapes import ModelShape

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


def plan_score(config: ScoreConfig, shapes: Shapes) -> Plan:
    """The plan of `score`; the configuration must break no rule."""
    models = {"teacher": config.teacher, "student": config.student}
    numbers = [("rows per saved part", config.rows_per_part)]
    for name, model in models.items():
        share = math.ceil(config.rows_per_part / _replicas(model, config.world_size))
        numbers.append((f"{name} sequences per data-parallel rank and part, at most", share))
    plans = (_model_plan(name, model, shapes[name], config.world_size, use="frozen") for name, model in models.items())
    return Plan(tuple(numbers), tuple(plans))


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


def plan_evaluate(config: EvaluateConfig, shapes: Shapes, *, num_questions: int | None) -> Plan:
    """The plan of `evaluate`; the configuration must break no rule.

    Args:
        num_questions: of the set; None where only reading it would tell, then numbers that need it are left out.
    """
    k, dp = config.sampling.num_samples, _replicas(config.model, config.world_size)
    numbers = [("answers to each question", k)]
    part = config.questions_per_part
    if num_questions is not None:
        part = min(part, num_questions)
        numbers += [("questions, at most", num_questions), ("answers, at most", num_questions * k)]
    numbers += [
        ("answers in a saved part", part * k),
        ("answers per data-parallel rank and part, at most", math.ceil(part * k / dp)),
        ("sampled tokens per part, at most", part * k * config.sampling.max_completion_tokens),
    ]
    model = _model_plan("model", config.model, shapes["model"], config.world_size, use="frozen")
    return Plan(tuple(numbers), (model,))


def num_updates(config: RlConfig) -> int:
    """Optimizer steps of a whole RL run."""
    return config.num_steps * config.grpo.updates_per_batch


def num_sft_updates(config: SftConfig, *, num_rows: int | None) -> int:
    """Optimizer steps of a whole supervised run: `num_steps`, or enough full batches for `num_epochs`."""
    if config.num_steps is not None:
        return config.num_steps
    assert num_rows is not None, "num_steps is derived from num_epochs and the number of rows"
    return max(1, math.ceil(config.num_epochs * num_rows / config.global_batch_size))


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
