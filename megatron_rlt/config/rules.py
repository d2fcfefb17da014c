"""Rules across sections and between a configuration and its models, as lines that name rule, values and remedy.

A function returns one line for every rule that is broken, an empty list where all hold; nothing is raised, so
that a user sees all faults at once. Files and folders are left to `path_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from megatron_rlt.config.architecture import ModelShape, position_limit
from megatron_rlt.config.sections import (
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
)

Shapes = Mapping[str, ModelShape]  # by the model's section name; a model that could not be read is left out


def _residency_faults(name: str, trained: ModelConfig) -> list[str]:
    if trained.residency == "resident":
        return []
    return [
        f"{name}.residency={trained.residency}: a model that is trained stays on the device, its gradients and"
        " optimizer hold its weights; only frozen models can live on the host"
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


def _length_faults(shapes: Shapes, tokens: int, *, what: str, remedy: str) -> list[str]:
    return [
        f"{what} tokens: longer than {name}.model's {limit} positions; {remedy} by at least {tokens - limit}"
        for name, limit in ((name, position_limit(shape)) for name, shape in shapes.items())
        if tokens > limit
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
