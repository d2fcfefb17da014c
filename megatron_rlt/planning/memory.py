"""Memory of the fullest rank in every phase: what all phases hold, and what each of them adds.

Phases follow each other, so the peak is the largest phase, not their sum. Ranks differ by their pipeline stages, one
per model; each combination of stages that occurs is planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_rlt.config.fp8 import saved_bytes
from megatron_rlt.config.plan import DTYPE_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES, rank_parameters, replicas
from megatron_rlt.config.training import CheckpointConfig
from megatron_rlt.planning.activations import LayerForm, Split, Stage, passing_per_token, training_bytes
from megatron_rlt.planning.output_layer import OutputLayer, shard_entries
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.sampling import rollout_bytes, sync_bytes, vllm_asleep_bytes
from megatron_rlt.planning.work import REFERENCE, Held, Pass, Work

_FLOAT32 = 4
# Weights per bucket of gradients, whose optimizer state a save gathers one by one (Megatron's default).
_BUCKET_PARAMETERS = 40_000_000


@dataclass(frozen=True)
class PhaseMemory:
    """One phase on its fullest rank, in bytes."""

    phase: str
    rank: int
    weights: float
    gradients: float
    optimizer: float
    caches: float  # KV cache, or vLLM's claim
    activations: float  # with the output layer
    buffers: float  # of a sync or save, and workspaces

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.caches + self.activations + self.buffers


def peaks(work: Work, platform: Platform) -> tuple[PhaseMemory, ...]:
    """Every phase on the rank that is fullest in it, in the order in which they run."""
    by_rank = [phases_of_rank(work, platform, rank) for rank in _distinct_ranks(work)]
    return tuple(max(same, key=lambda one: one.total) for same in zip(*by_rank, strict=True))


def peak(phases: tuple[PhaseMemory, ...]) -> PhaseMemory:
    return max(phases, key=lambda one: one.total)


def phases_of_rank(work: Work, platform: Platform, rank: int) -> list[PhaseMemory]:
    """All phases of one rank."""
    return list(_Rank(work, platform, rank).phases())


def stage_of(held: Held, world_size: int, rank: int) -> int:
    """Megatron gives neighbouring ranks the same stage: stages are the slowest to change."""
    return rank // (world_size // held.model.layout.pp)


def weight_bytes(held: Held, stage: int) -> int:
    """One model's weights on a rank of a stage, wherever they lie."""
    layout, model = held.model.layout, held.model
    whole = rank_parameters(held.shape, tp=layout.tp, pp=layout.pp, stage=stage) * DTYPE_BYTES[model.dtype]
    if model.fp8 is None:
        return whole
    return whole - saved_bytes(model.fp8, held.shape, tp=layout.tp, pp=layout.pp, stage=stage)


def _distinct_ranks(work: Work) -> list[int]:
    """The first rank of every combination of stages."""
    first: dict[tuple[int, ...], int] = {}
    step = math.gcd(*(work.world_size // held.model.layout.pp for held in work.held))
    for rank in range(0, work.world_size, step):
        first.setdefault(tuple(stage_of(held, work.world_size, rank) for held in work.held), rank)
    return list(first.values())


class _Rank:
    """What one rank holds in every phase."""

    def __init__(self, work: Work, platform: Platform, rank: int) -> None:
        self._work, self._platform, self._rank = work, platform, rank
        self._stages = {held.name: stage_of(held, work.world_size, rank) for held in work.held}
        self._resident = sum(weight_bytes(held, self._stages[held.name]) for held in work.held if not held.offload)
        self._gradients, self._optimizer = self._of_training()
        self._asleep = vllm_asleep_bytes(work, platform)

    def phases(self) -> Iterator[PhaseMemory]:
        work, sampling = self._work, self._work.sampling
        if sampling is not None:
            held = work.model(sampling.name)
            if sampling.vllm is not None:
                awake, buffers = sync_bytes(work, platform=self._platform)
                yield self._phase("sync", caches=awake, buffers=buffers)
            caches, passing = rollout_bytes(work, self._platform, stage=self._stages[held.name])
            yield self._phase("rollout", users=(held,), caches=caches, activations=passing)
        for one in work.passes:
            held = work.model(one.name)
            count = self._update if one.kind == "update" else self._forward
            yield self._phase(one.phase, users=(held,), activations=count(one, held))
        if work.trained is not None:
            models = tuple(held for held in work.held if held.is_trained or held.name == "reference")
            yield self._phase("save", users=models, buffers=self._gathered(work.trained))

    def _phase(
        self,
        name: str,
        *,
        users: tuple[Held, ...] = (),
        caches: float | None = None,
        activations: float = 0.0,
        buffers: float = 0.0,
    ) -> PhaseMemory:
        """`users`: models that run, whose offloaded weights are on the device."""
        onloaded = sum(weight_bytes(held, self._stages[held.name]) for held in users if held.offload)
        return PhaseMemory(
            phase=name,
            rank=self._rank,
            weights=self._resident + onloaded,
            gradients=self._gradients,
            optimizer=self._optimizer,
            caches=self._asleep if caches is None else caches,
            activations=activations,
            buffers=buffers + self._platform.workspace_bytes,
        )

    def _of_training(self) -> tuple[int, int]:
        held = self._work.trained
        if held is None:
            return 0, 0
        layout = held.model.layout
        parameters = rank_parameters(held.shape, tp=layout.tp, pp=layout.pp, stage=self._stages[held.name])
        share = math.ceil(parameters / (layout.cp * replicas(held.model, self._work.world_size)))
        return parameters * GRADIENT_BYTES, share * OPTIMIZER_BYTES[held.model.dtype]

    def _forward(self, one: Pass, held: Held) -> float:
        """Of one pack: layers follow each other and keep nothing; the output layer comes last."""
        form, split, tokens = LayerForm.of(held.shape), Split.of(held.model.layout), self._pack_tokens(one, held)
        width, is_fused = DTYPE_BYTES[held.model.dtype], self._platform.is_fused(held.model)
        passing = tokens * passing_per_token(form, split, dtype_bytes=width, is_fused=is_fused)
        is_last = self._stages[held.name] == held.model.layout.pp - 1
        return max(passing, output_layer(held, self._work, self._platform).forward_bytes(tokens) if is_last else 0.0)

    def _update(self, one: Pass, held: Held) -> float:
        layout, tokens = held.model.layout, self._pack_tokens(one, held)
        dp = replicas(held.model, self._work.world_size)
        stage = Stage.of(
            held.shape, layout, stage=self._stages[held.name], num_packs=one.num_packs(self._work.lengths, dp)
        )
        output = output_layer(held, self._work, self._platform).backward_bytes(tokens) if stage.is_last else 0.0
        return training_bytes(
            LayerForm.of(held.shape),
            Split.of(layout),
            stage,
            tokens=tokens,
            recompute=held.model.recompute,
            output_bytes=output,
            dtype_bytes=DTYPE_BYTES[held.model.dtype],
            is_fused=self._platform.is_fused(held.model),
        )

    def _pack_tokens(self, one: Pass, held: Held) -> float:
        dp = replicas(held.model, self._work.world_size)
        return one.pack_tokens(self._work.lengths, dp) / held.model.layout.cp

    def _gathered(self, held: Held) -> float:
        """On a GPU a save gathers one bucket's float32 state of all data-parallel ranks at a time, if it gathers."""
        layout = held.model.layout
        if self._work.saves is None or self._work.saves.reshardable == "tp_pp":
            return 0.0
        table = shard_entries(held.shape.vocab_size, layout.tp) * held.shape.hidden_size
        return _FLOAT32 * max(_BUCKET_PARAMETERS, table) if self._platform.device is not None else 0.0


def output_layer(held: Held, work: Work, platform: Platform) -> OutputLayer:
    layout = held.model.layout
    rows, entries = platform.blocks(work.blocks)
    return OutputLayer(
        hidden=held.shape.hidden_size,
        shard=shard_entries(held.shape.vocab_size, layout.tp),
        row_block=rows,
        vocab_block=entries,
        dtype_bytes=DTYPE_BYTES[held.model.dtype],
        gathers=layout.sp,
        tp=layout.tp,
    )


def _saved_bytes(work: Work, held: Held, saves: CheckpointConfig) -> dict[str, float]:
    """Host memory of a save on one rank.

    Where it gathers: main weights and moments of the rank's whole shard, beside the rank's own part of them. In the
    background: what the rank writes, its replica's share of the optimizer and of all saved weights.
    """
    layout, found = held.model.layout, {}
    parameters = rank_parameters(held.shape, tp=layout.tp, pp=layout.pp, stage=layout.pp - 1)
    own = parameters / (layout.cp * replicas(held.model, work.world_size))
    if saves.reshardable == "full":
        found["a save: optimizer, gathered"] = 3 * _FLOAT32 * (parameters + own)
    if saves.background:
        models = sum(one.is_trained or one.name == REFERENCE for one in work.held)
        found["a save: copies that are being written"] = own * (3 * _FLOAT32 + models * DTYPE_BYTES[held.model.dtype])
    return found


@dataclass(frozen=True)
class HostMemory:
    """Memory of one node in bytes, at its fullest, by what it is for."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def host_memory(work: Work, platform: Platform) -> HostMemory:
    """Of the node whose ranks hold the last stages, beside what processes need for themselves."""
    local = min(platform.gpus_per_node, work.world_size)
    parts: dict[str, float] = {}
    for held in work.held:
        if held.offload:
            parts[f"{held.name}, offloaded"] = local * weight_bytes(held, held.model.layout.pp - 1)
    if work.trained is not None and work.saves is not None:
        parts |= {name: local * size for name, size in _saved_bytes(work, work.trained, work.saves).items()}
    vllm = None if work.sampling is None else work.sampling.vllm
    if vllm is not None and vllm.placement == "colocated" and vllm.sleep_level == 1 and platform.device is not None:
        assert work.sampling is not None
        held = work.model(work.sampling.name)
        tp = vllm.tp or held.model.layout.tp
        parameters = rank_parameters(held.shape, tp=tp, pp=1, stage=0)
        parts["vLLM's weights, asleep"] = local * parameters * DTYPE_BYTES[held.model.dtype]
    return HostMemory(parts)
