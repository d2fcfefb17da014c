"""Nearby settings and layouts that fit where a configuration does not, the cheapest first.

One change is tried, then pairs, then triples, until some fit. Their price is GPU time per step; among equal prices the
fewest changes win, then the order below, which is that of what they usually cost beyond the plan's arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import Shapes
from megatron_rlt.planning.memory import PhaseMemory
from megatron_rlt.planning.target import changed

_MOST_SHOWN = 6
_STRONGEST = 12  # changes from which triples are made
_SMALL_BLOCKS = {"scoring.row_block": 1024, "scoring.vocab_block": 8192}

Change = Mapping[str, object]
"""New values by dotted key."""


@dataclass(frozen=True)
class Outcome:
    """What a configuration needs."""

    peak: PhaseMemory
    gpu_seconds: float  # of a step or part, over all GPUs; 0 where no rate is known


@dataclass(frozen=True)
class Remedy:
    """A change with what follows from it."""

    change: Change
    outcome: Outcome


def remedies(
    config: JobConfig,
    shapes: Shapes,
    *,
    limit: float,
    gpus_per_node: int,
    has_fp8: bool,
    try_out: Callable[[JobConfig], Outcome],
) -> list[Remedy]:
    """The cheapest changes with which every phase needs at most `limit` bytes; empty if none was found."""
    tried: list[Remedy] = []
    for change in single_changes(config, gpus_per_node=gpus_per_node, has_fp8=has_fp8):
        if (outcome := _outcome(config, shapes, change, try_out)) is not None:
            tried.append(Remedy(change, outcome))
    found = _cheapest(tried, limit)
    strongest = sorted(tried, key=lambda one: one.outcome.peak.total)[:_STRONGEST]
    for size, of in ((2, tried), (3, strongest)):
        if found:
            break
        together = []
        for several in itertools.combinations(of, size):
            change = {key: value for one in several for key, value in one.change.items()}
            if len(change) == sum(len(one.change) for one in several):
                outcome = _outcome(config, shapes, change, try_out)
                together += [] if outcome is None else [Remedy(change, outcome)]
        found = _cheapest(together, limit)
    return found


def _cheapest(tried: Sequence[Remedy], limit: float) -> list[Remedy]:
    fitting = [one for one in tried if one.outcome.peak.total <= limit]
    return sorted(fitting, key=lambda one: (round(one.outcome.gpu_seconds, 2), len(one.change)))[:_MOST_SHOWN]


def _outcome(
    config: JobConfig, shapes: Shapes, change: Change, try_out: Callable[[JobConfig], Outcome]
) -> Outcome | None:
    """None where the change breaks a rule."""
    other = config
    for dotted, value in change.items():
        other = changed(other, dotted, value)
    return None if other.faults(shapes) else try_out(other)


def single_changes(config: JobConfig, *, gpus_per_node: int, has_fp8: bool) -> Iterator[Change]:
    """Everything that is tried on its own."""
    yield from _settings(config)
    trained, sampled = _trained(config), _sampled(config)
    for name, model in config.models.items():
        if name == trained and model.recompute != "full":
            yield {f"{name}.recompute": "full"}
        if name in (trained, sampled):
            continue
        if not model.offload:
            yield {f"{name}.offload": True}
        if has_fp8 and model.fp8 is None and model.dtype == "bfloat16":
            yield {f"{name}.fp8": Fp8Config()}
    for name, model in config.models.items():
        layout = model.layout
        if layout.tp > 1 and not layout.sp:
            yield {f"{name}.layout.sp": True}
        for tp in _doubled(layout.tp, gpus_per_node):
            yield {f"{name}.layout.tp": tp, f"{name}.layout.sp": True}
        for pp in _doubled(layout.pp, 8):
            yield {f"{name}.layout.pp": pp}
        for cp in _doubled(layout.cp, 8):
            yield {f"{name}.layout.cp": cp}
    yield {"world_size": 2 * config.world_size}


def _trained(config: JobConfig) -> str | None:
    if isinstance(config, RlConfig):
        return config.policy_name
    return "model" if isinstance(config, SftConfig) else None


def _sampled(config: JobConfig) -> str | None:
    """A frozen model that samples."""
    if isinstance(config, CollectConfig):
        return "teacher"
    return "model" if isinstance(config, EvaluateConfig) else None


def _settings(config: JobConfig) -> Iterator[Change]:
    """Batch sizes and budgets: none of them changes a result."""
    if isinstance(config, RlConfig | SftConfig | CollectConfig) and config.scoring.row_block is None:
        yield _SMALL_BLOCKS
    if isinstance(config, RlConfig | CollectConfig):
        longest = config.prompts.max_prompt_tokens + config.rollout.max_completion_tokens
        for tokens in _halved(config.scoring.max_tokens_per_pack, longest):
            yield {"scoring.max_tokens_per_pack": tokens}
        yield from _rollout(config)
    if isinstance(config, RlConfig):
        for tokens in _halved(config.grpo.max_tokens_per_pack, longest):
            yield {"grpo.max_tokens_per_pack": tokens}
        if config.grpo.reference is not None and not config.grpo.reference.offload:
            yield {"grpo.reference.offload": True}
    if isinstance(config, SftConfig):
        for tokens in _halved(config.max_tokens_per_pack, config.max_tokens):
            yield {"max_tokens_per_pack": tokens}
    if isinstance(config, EvaluateConfig):
        for rows in _halved(config.sampling.max_batch_size, 4):
            yield {"sampling.max_batch_size": rows}


def _rollout(config: RlConfig | CollectConfig) -> Iterator[Change]:
    rollout = config.rollout
    if rollout.engine != "vllm":
        for rows in _halved(rollout.max_batch_size, 4):
            yield {"rollout.max_batch_size": rows}
        return
    if rollout.vllm.placement == "colocated":
        if rollout.vllm.sleep_level == 0:
            yield {"rollout.vllm.sleep_level": 1}
        for share in (0.3, 0.2):
            if share < rollout.vllm.gpu_memory_share:
                yield {"rollout.vllm.gpu_memory_share": share}


def _halved(value: int, least: int) -> list[int]:
    """The value's halves down to the least that has an effect."""
    halves = []
    while value > least:
        value = max(value // 2, least)
        halves.append(value)
    return halves


def _doubled(value: int, most: int) -> list[int]:
    doubles = []
    while 2 * value <= most:
        value *= 2
        doubles.append(value)
    return doubles
