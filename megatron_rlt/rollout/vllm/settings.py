"""vLLM's settings, in whichever process it runs: how it starts, and how it samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rlt.config.rollout import VllmConfig
from megatron_rlt.rollout.requests import KnownStopCondition, SampleRequest, require_finite
from megatron_rlt.rollout.vllm.weight_inspector import WeightInspector
from megatron_rlt.types import Completion, FinishReason

# Without a size, vLLM 0.32 claims most of a CPU's memory, and fails to start if that is not free.
_CPU_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class EngineShape:
    """Model, size and layout of a vLLM engine."""

    folder: Path  # Hugging Face folder of architecture and tokenizer
    dtype: str
    tp: int
    max_tokens: int  # longest prompt and completion together
    max_batch_size: int  # completions that decode together
    max_prefill_tokens: int  # that go through the model together
    settings: VllmConfig
    on_gpu: bool

    def options(self) -> dict[str, Any]:
        """Start options, by the names that vLLM's LLM class and (with dashes) its server share."""
        cache_bytes = self.settings.kv_cache_bytes
        batched_tokens = max(self.max_prefill_tokens, self.max_batch_size)
        if not self.on_gpu:
            cache_bytes = _CPU_CACHE_BYTES if cache_bytes is None else cache_bytes
            batched_tokens = max(batched_tokens, self.max_tokens)
        return {
            "model": str(self.folder),
            "trust_remote_code": False,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tp,
            "max_model_len": self.max_tokens,
            "max_num_seqs": self.max_batch_size,
            "max_num_batched_tokens": batched_tokens,
            # A seeded request whose prompt is prefilled in pieces rewinds its generator, which no CPU generator can.
            "enable_chunked_prefill": self.on_gpu,
            "enable_prefix_caching": True,
            "gpu_memory_utilization": self.settings.gpu_memory_share,
            "kv_cache_memory_bytes": cache_bytes,
            "enforce_eager": self.settings.enforce_eager or not self.on_gpu,
            "logprobs_mode": "processed_logprobs",
            "seed": 0,
        }

    @property
    def transfer_backend(self) -> str | None:
        """vLLM's name of the weight transfer engine of its servers; None: weights travel as files."""
        return {"files": None, "broadcast": "nccl", "ipc": "ipc"}[self.settings.server.transport]

    def server_options(self) -> dict[str, Any]:
        """As `options`, for a server."""
        backend = self.transfer_backend
        extension = f"{WeightInspector.__module__}.{WeightInspector.__qualname__}"
        transfer = {} if backend is None else {"weight_transfer_config": json.dumps({"backend": backend})}
        return self.options() | {"worker_extension_cls": extension} | transfer


@dataclass(frozen=True, eq=False)
class Sampling:
    """How completions are drawn and where they end; vLLM may stop later, and its ids are cut."""

    temperature: float
    top_p: float
    num_token_ids: int  # only ids below it are sampled, and log-probs are over these ids
    vocab_size: int  # of the model
    max_completion_tokens: int
    stop: KnownStopCondition

    def settings(self) -> dict[str, Any]:
        """Settings of one request, by the names that vLLM's SamplingParams and its server share; no n, no seed."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_completion_tokens,
            "logprobs": 0,  # of the sampled token alone
            "ignore_eos": True,  # a completion ends at the stop ids below, whatever the folder names as its end
            "stop_token_ids": sorted(self.stop.stop_ids),
            "stop": [] if self.stop.end_tag is None else [self.stop.end_tag],
            "skip_special_tokens": False,  # an end tag may be one
            "allowed_token_ids": None if self.num_token_ids >= self.vocab_size else list(range(self.num_token_ids)),
        }

    def completion(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        finish_reason: str,
        request: SampleRequest,
        policy_version: int,
    ) -> Completion:
        """vLLM's answer to a request as a completion, cut by this project's stop condition.

        Raises as `cut` and `require_finite`.
        """
        require_finite(logprobs, request)
        length, reason = self.cut(list(token_ids), finish_reason)
        return Completion(
            token_ids=torch.tensor(token_ids[:length], dtype=torch.int64),
            rollout_logprobs=torch.tensor(logprobs[:length], dtype=torch.float32),
            temperature=self.temperature,
            finish_reason=reason,
            seed=request.seed,
            policy_version=policy_version,
        )

    def cut(self, token_ids: list[int], finish_reason: str) -> tuple[int, FinishReason]:
        """Number of vLLM's ids up to this project's stop, and the reason; RuntimeError if vLLM stopped before it."""
        # A token writes at least one byte of the tag, so vLLM's text shows the tag at most this many tokens later.
        reach = 1 if self.stop.end_tag is None else len(self.stop.end_tag.encode()) + 1
        for length in range(max(1, len(token_ids) - reach), len(token_ids) + 1):
            if self.stop(token_ids[:length]):
                return length, FinishReason.STOP
        if finish_reason != "length":
            raise RuntimeError(
                f"vLLM ended a completion after {len(token_ids)} tokens ({finish_reason}) where this project's stop"
                " condition would go on: the two read the tokens differently"
            )
        return len(token_ids), FinishReason.LENGTH
