"""Memory of sampling: the embedded engine's KV cache and logits, vLLM's claim, the buffers of a weight sync."""

from __future__ import annotations

import math

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.plan import DTYPE_BYTES, rank_parameters, replicas
from megatron_rlt.config.rollout import FIRST_CACHE_SLOTS
from megatron_rlt.planning.activations import LayerForm, Split, passing_per_token
from megatron_rlt.planning.output_layer import shard_entries
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.work import Held, Sampling, Work

_FLOAT32, _FLOAT64 = 4, 8
_CPU_CACHE_BYTES = 2**30  # vLLM's KV cache on a CPU, where it is not set


def cache_bytes_per_token(shape: Architecture, layout: LayoutConfig, dtype: str) -> int:
    """Keys and values of one token on one rank."""
    return 2 * (shape.num_layers // layout.pp) * (shape.num_kv_heads // layout.tp) * shape.head_dim * DTYPE_BYTES[dtype]


def cache_slots(prompt: int, completion: float, *, longest: int) -> int:
    """Slots that the embedded engine reserves per row: the first ones, doubled until the row fits."""
    slots = min(prompt + FIRST_CACHE_SLOTS, longest)
    while slots < min(prompt + completion, longest):
        slots = min(longest, 2 * slots)
    return slots


def decoding_rows(sampling: Sampling, held: Held, world_size: int) -> int:
    """Completions that one replica decodes together. Context-parallel ranks are replicas here."""
    engines = replicas(held.model, world_size) * held.model.layout.cp
    return min(sampling.max_batch_size, math.ceil(sampling.num_completions / engines))


def rollout_bytes(work: Work, platform: Platform, *, stage: int) -> tuple[float, float]:
    """KV cache or vLLM's claim, and what passes through the embedded engine."""
    sampling = work.sampling
    assert sampling is not None, "nothing is sampled"
    if sampling.vllm is not None:
        return sync_bytes(work, platform=platform)[0], 0.0
    held, lengths = work.model(sampling.name), work.lengths
    layout, shape = held.model.layout, held.shape
    rows = decoding_rows(sampling, held, work.world_size)
    prompt = math.ceil(lengths.prompt)
    slots = cache_slots(prompt, lengths.completion, longest=lengths.longest)
    per_token = cache_bytes_per_token(shape, layout, held.model.dtype)
    groups = math.ceil(rows / sampling.group_size)
    prompts = (groups + 1) * prompt  # kept until the last of their groups has joined
    is_last = stage == layout.pp - 1
    logits = rows * shard_entries(shape.vocab_size, layout.tp) * _FLOAT32 if is_last else 0.0
    if is_last:
        # Gathered over tp, then log-probs and their predecessor in float32, probabilities and their sums in float64.
        whole = rows if platform.device is not None else 0
        logits += rows * shape.vocab_size * _FLOAT32 + whole * shape.vocab_size * (2 * _FLOAT32 + 2 * _FLOAT64)
    tokens = max(prompt, min(sampling.max_prefill_tokens, groups * prompt))
    width = DTYPE_BYTES[held.model.dtype]
    prefill = tokens * passing_per_token(
        LayerForm.of(shape), Split(layout.tp, 1), dtype_bytes=width, is_fused=platform.is_fused(held.model)
    )
    return per_token * (rows * slots + prompts), max(logits, prefill)


def vllm_claim_bytes(work: Work, platform: Platform) -> float:
    """What a colocated vLLM takes while it is awake: a share of the whole card, or weights and a stated cache."""
    sampling = work.sampling
    if sampling is None or sampling.vllm is None or sampling.vllm.placement == "server":
        return 0.0
    vllm, device = sampling.vllm, platform.device
    if device is not None and vllm.kv_cache_bytes is None:
        return vllm.gpu_memory_share * device.memory_bytes
    return vllm_weight_bytes(work) + (vllm.kv_cache_bytes or _CPU_CACHE_BYTES)


def vllm_weight_bytes(work: Work) -> float:
    """Its copy of the policy on one rank."""
    assert work.sampling is not None
    assert work.sampling.vllm is not None
    held = work.model(work.sampling.name)
    tp = work.sampling.vllm.tp or held.model.layout.tp
    return rank_parameters(held.shape, tp=tp, pp=1, stage=0) * DTYPE_BYTES[held.model.dtype]


def vllm_floor_bytes(work: Work) -> float:
    """The least with which vLLM starts: its weights, and the cache of one completion as long as allowed."""
    assert work.sampling is not None
    assert work.sampling.vllm is not None
    held = work.model(work.sampling.name)
    tp = work.sampling.vllm.tp or held.model.layout.tp
    layout = LayoutConfig(tp=tp)
    return vllm_weight_bytes(work) + work.lengths.longest * cache_bytes_per_token(held.shape, layout, held.model.dtype)


def vllm_asleep_bytes(work: Work, platform: Platform) -> float:
    """What it keeps while the trainer works; on a CPU nothing is freed."""
    if work.sampling is None or work.sampling.vllm is None:
        return 0.0
    stays_awake = work.sampling.vllm.sleep_level == 0 or platform.device is None
    return vllm_claim_bytes(work, platform) if stays_awake else 0.0


def sync_bytes(work: Work, *, platform: Platform) -> tuple[float, float]:
    """vLLM's claim, and the buffers with which its weights are sent.

    The largest tensor is gathered over tp; servers get buckets by broadcast or CUDA IPC, of which the sender holds two.
    """
    sampling = work.sampling
    assert sampling is not None
    assert sampling.vllm is not None
    held = work.model(sampling.name)
    largest = held.shape.hidden_size * max(held.shape.vocab_size, 2 * held.shape.ffn_size)
    buffers = float(largest * DTYPE_BYTES[held.model.dtype])
    server = sampling.vllm.server
    if sampling.vllm.placement == "server" and server.transport != "files":
        buffers += 2 * server.bucket_bytes
    return vllm_claim_bytes(work, platform), buffers
