"""Seconds of every phase of a step, from model FLOP and a rate, with the ground on which each rate stands.

Rates come from a run's own metrics where one is given. Else they are shares of the GPU's peak that were measured on one
H100, or assumptions, which say so. Communication between GPUs is in neither; a calibrated rate includes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlt.config.flops import BACKWARD_PASSES, call_flops, causal_pairs
from megatron_rlt.config.plan import DTYPE_BYTES, num_parameters, replicas
from megatron_rlt.planning.calibration import Calibration
from megatron_rlt.planning.memory import weight_bytes
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.sampling import cache_bytes_per_token, decoding_rows, vllm_weight_bytes
from megatron_rlt.planning.work import REFERENCE, Held, Pass, Work

# Docs: 10 ms per token for 4 layers on an H100, with 16 and with 128 rows alike: kernel launches.
_SECONDS_PER_LAYER_AND_TOKEN = 0.0025
_MEASURED, _ASSUMED, _CALIBRATED = "measured on one H100", "assumed", "from metrics.jsonl"
# Assumed until a run is given: pinned host memory to GPU, through the CPU, to a shared file system per job; and from a
# GPU to host memory that is not pinned, per rank.
_ONLOAD_BYTES_PER_SECOND, _SYNC_BYTES_PER_SECOND, _SAVE_BYTES_PER_SECOND = 25e9, 5e9, 2e9
_COPY_BYTES_PER_SECOND = 2e9
_VLLM_BANDWIDTH_SHARE = 0.5
_FP8_SPEEDUP = 1.2  # of blockwise over bf16 in scoring, docs/gpu.md
_RECOMPUTED_PASSES = {"none": 0.0, "selective": 0.0, "full": 1.0}


@dataclass(frozen=True)
class Shares:
    """Shares of the bfloat16 peak where nothing is calibrated."""

    scoring: float
    update: float


@dataclass(frozen=True)
class PhaseSeconds:
    """One phase of a mean step."""

    phase: str
    seconds: float
    model_flops: float  # over all ranks; 0 where bytes decide
    ground: str  # on which its rate stands


def step_seconds(
    work: Work, platform: Platform, shares: Shares, calibration: Calibration | None
) -> tuple[PhaseSeconds, ...]:
    """Every phase of a step or part; empty for a GPU of unknown peak without calibration."""
    return tuple(_Clock(work, platform, shares, calibration).phases())


def total_seconds(phases: tuple[PhaseSeconds, ...]) -> float:
    return sum(phase.seconds for phase in phases)


class _Clock:
    def __init__(self, work: Work, platform: Platform, shares: Shares, calibration: Calibration | None) -> None:
        self._work, self._platform, self._shares = work, platform, shares
        self._rates: Mapping[str, float] = {} if calibration is None else calibration.flops_per_second_of_rank
        self._fixed: Mapping[str, float] = {} if calibration is None else calibration.fixed_seconds
        self._token_seconds = None if calibration is None else calibration.seconds_per_decoded_token

    def phases(self) -> list[PhaseSeconds]:
        device, found = self._platform.device, []
        peak = None if device is None else device.peak_flops_per_second
        if peak is None and not self._rates:
            return []
        if self._work.sampling is not None:
            found += self._sampled()
        found += [self._read(one, peak) for one in self._work.passes if peak is not None or one.phase in self._rates]
        found += [PhaseSeconds(name, seconds, 0.0, _CALIBRATED) for name, seconds in self._fixed.items()]
        if self._work.trained is not None and "checkpoint" not in self._fixed:
            found.append(self._saved(self._work.trained))
        return found

    def _read(self, one: Pass, peak: float | None) -> PhaseSeconds:
        held, work = self._work.model(one.name), self._work
        lengths, layout = work.lengths, held.model.layout
        flops = one.num_sequences * call_flops(
            held.shape,
            num_tokens=lengths.mean,
            num_pairs=causal_pairs(lengths.mean),
            num_rows=lengths.completion,
        )
        is_update = one.kind == "update"
        flops *= 1 + BACKWARD_PASSES if is_update else 1
        packs = one.num_packs(lengths, replicas(held.model, work.world_size))
        bubble = 1 + (layout.pp - 1) / packs
        if one.phase in self._rates:
            return PhaseSeconds(one.phase, flops / (self._rates[one.phase] * work.world_size), flops, _CALIBRATED)
        assert peak is not None, "the caller leaves out what has no rate"
        share = self._shares.update if is_update else self._shares.scoring
        if is_update:
            share /= 1 + _RECOMPUTED_PASSES[held.model.recompute] / (1 + BACKWARD_PASSES)
        elif held.model.fp8 is not None and held.model.fp8.activations:
            share *= _FP8_SPEEDUP
        seconds = bubble * flops / (share * peak * work.world_size)
        if held.offload:
            seconds += weight_bytes(held, layout.pp - 1) / _ONLOAD_BYTES_PER_SECOND
        return PhaseSeconds(one.phase, seconds, flops, f"{share:.0%} of the peak, {_MEASURED}")

    def _sampled(self) -> list[PhaseSeconds]:
        sampling, work = self._work.sampling, self._work
        assert sampling is not None
        held = work.model(sampling.name)
        if sampling.vllm is None:
            rows = decoding_rows(sampling, held, work.world_size)
            engines = replicas(held.model, work.world_size) * held.model.layout.cp
            waves = math.ceil(sampling.num_completions / engines) / rows
            token, ground = self._launched(held)
            return [PhaseSeconds("rollout", max(1.0, waves) * work.lengths.completion * token, 0.0, ground)]
        policy = num_parameters(held.shape) * DTYPE_BYTES[held.model.dtype]
        sync = PhaseSeconds("sync", policy / _SYNC_BYTES_PER_SECOND, 0.0, f"5 GB/s, {_ASSUMED}")
        return [sync, self._vllm(held)]

    def _launched(self, held: Held) -> tuple[float, str]:
        """Seconds per token of all rows together, whose number does not matter: kernel launches take longer."""
        if self._token_seconds is not None:
            return self._token_seconds, _CALIBRATED
        launch = _SECONDS_PER_LAYER_AND_TOKEN * held.shape.num_layers
        return launch, f"{launch * 1e3:.0f} ms per token, launch-bound, {_MEASURED}"

    def _vllm(self, held: Held) -> PhaseSeconds:
        """Each token reads the weights once, and the cache of its row: half of the memory's bandwidth."""
        sampling, work, device = self._work.sampling, self._work, self._platform.device
        assert sampling is not None
        assert sampling.vllm is not None
        if self._token_seconds is not None:
            seconds = self._token_seconds * work.lengths.completion
            return PhaseSeconds("rollout", seconds, 0.0, _CALIBRATED)
        tp = sampling.vllm.tp or held.model.layout.tp
        is_server = sampling.vllm.placement == "server"
        servers = sampling.vllm.server
        engines = len(servers.addresses or servers.devices) if is_server else work.world_size // tp
        per_engine = math.ceil(sampling.num_completions / engines)
        rows = min(sampling.max_batch_size, per_engine)
        layout = held.model.layout.model_copy(update={"tp": tp, "pp": 1})
        per_token = cache_bytes_per_token(held.shape, layout, held.model.dtype)
        filled = work.lengths.prompt + work.lengths.completion / 2
        bandwidth = None if device is None else device.bandwidth_bytes_per_second
        if bandwidth is None:
            return PhaseSeconds("rollout", 0.0, 0.0, "unknown: no bandwidth of this device")
        token = (vllm_weight_bytes(work) + rows * filled * per_token) / (_VLLM_BANDWIDTH_SHARE * bandwidth)
        seconds = per_engine / rows * work.lengths.completion * token
        return PhaseSeconds("rollout", seconds, 0.0, f"half of the memory's bandwidth, {_ASSUMED}")

    def _saved(self, held: Held) -> PhaseSeconds:
        """Per step, since only some steps save: weights of policy and reference, and 12 bytes a weight of optimizer.

        In the background training stands still for the copies alone, which every rank makes of its own share.
        """
        saves = self._work.saves
        assert saves is not None, "what is trained is saved"
        models = sum(one.is_trained or one.name == REFERENCE for one in self._work.held)
        written = num_parameters(held.shape) * (models * DTYPE_BYTES[held.model.dtype] + 12) / saves.interval_steps
        if saves.background:
            seconds = written / self._work.world_size / _COPY_BYTES_PER_SECOND
            return PhaseSeconds("save", seconds, 0.0, f"copies at 2 GB/s per rank, {_ASSUMED}")
        return PhaseSeconds("save", written / _SAVE_BYTES_PER_SECOND, 0.0, f"2 GB/s, {_ASSUMED}")
