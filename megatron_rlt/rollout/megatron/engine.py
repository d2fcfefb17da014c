"""The embedded sampling engine: continuous batching with Megatron's own shards of the policy, in the policy's layout.

Pipeline stages run one after the other, so vLLM is faster for large models; this engine needs no weight sync and no
second copy of the weights.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.models.decoding import decoding
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.collectives import gather_by_index
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.rollout.megatron.decoding_batch import DecodingBatch, Draw, Row
from megatron_rlt.rollout.megatron.prefill import Prompts
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine, StopCondition
from megatron_rlt.rollout.sampling import most_probable, sample, uniforms
from megatron_rlt.types import Completion, OnProgress, tell_nobody

# Waiting requests join once a quarter of the batch is free: joining at every freed row would prefill prompts singly.
_ADMISSION_DIVISOR = 4


@dataclass(frozen=True)
class SamplingWork:
    """The work of one `generate` on this replica."""

    prompt_tokens: int  # prefilled tokens without padding; each distinct prompt counts once
    decoded_rows: int  # unfinished rows, summed over decoding steps
    num_steps: int
    prefill_seconds: float
    decode_seconds: float


class MegatronEngine(SamplingEngine):
    """Samples completions from a model on these ranks, with the weights that it has at the call."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        temperature: float,
        top_p: float,
        greedy: bool,
        num_token_ids: int,
        max_completion_tokens: int,
        max_batch_size: int,
        max_prefill_tokens: int,
        stop: StopCondition,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """Bind the engine to this rank's stage of the policy, not wrapped by DistributedDataParallel.

        Args:
            greedy: take the most probable token instead of sampling; log-probs are still at `temperature`.
            num_token_ids: only ids below it are sampled: models padded to different vocabulary sizes share a tokenizer,
                and a student cannot score an id that it does not have. Log-probs are over these ids.
            max_completion_tokens: length at which a completion ends with `FinishReason.LENGTH`.
            max_batch_size: completions that decode together on one replica.
            max_prefill_tokens: prompt tokens per prefill, padding included; a longer prompt is prefilled alone.
            stop: ends a completion with `FinishReason.STOP`; the token that ends it belongs to it.
            on_progress: called after every decoding step of the batch.
        """
        self.architecture = model.architecture
        self._model = model
        self._temperature = temperature

        def draw(logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            if greedy:
                return most_probable(logits[:, :num_token_ids], temperature=temperature)
            uniform = uniforms(seeds, positions)
            return sample(logits[:, :num_token_ids], temperature=temperature, top_p=top_p, uniforms=uniform)

        self._draw: Draw = draw
        self._stop, self._on_progress = stop, on_progress
        self._max_completion_tokens, self._max_batch_size = max_completion_tokens, max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self.work = SamplingWork(0, 0, 0, 0.0, 0.0)  # of the last `generate`
        self._peak_cache_bytes = 0

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """As `SamplingEngine.generate`. Raises RuntimeError if the ranks of a replica sampled different tokens."""
        self.work = SamplingWork(0, 0, 0, 0.0, 0.0)
        # One token cannot be split over context-parallel ranks: each of them samples as a replica of its own.
        layout = self._model.layout
        num_replicas, replica = layout.dp_cp, layout.dp_cp_rank
        # Contiguous shares keep a group's equal prompts on one replica, where they are computed once.
        mine = range(len(requests) * replica // num_replicas, len(requests) * (replica + 1) // num_replicas)
        rows = self._decode([(index, requests[index]) for index in mine])
        _require_agreement(rows, layout)
        completions = {row.index: self._completion(row, policy_version) for row in rows}
        return gather_by_index(completions, len(requests), layout.dp_cp_group)

    def take_peak_cache_bytes(self) -> int:
        """As `SamplingEngine.take_peak_cache_bytes`."""
        peak, self._peak_cache_bytes = self._peak_cache_bytes, 0
        return peak

    def take_metrics(self) -> dict[str, float]:
        """As `SamplingEngine.take_metrics`: none, since it samples from the policy itself."""
        return {}

    def _decode(self, requests: Sequence[tuple[int, SampleRequest]]) -> list[Row]:
        """This replica's completions, in the order in which they finished."""
        if not requests:
            return []
        longest = max(request.token_ids.numel() for _, request in requests)
        prompts = Prompts(
            self._model,
            [request for _, request in requests],
            max_prefill_tokens=self._max_prefill_tokens,
            max_length=longest + self._max_completion_tokens,
        )
        batch = DecodingBatch(
            self._model,
            prompts,
            draw=self._draw,
            stop=self._stop,
            max_completion_tokens=self._max_completion_tokens,
            max_rows=min(self._max_batch_size, len(requests)),
            longest_prompt=longest,
        )
        waiting, finished = deque(requests), list[Row]()
        seconds = {"prefill": 0.0, "decode": 0.0}
        with self._model.onloaded(), decoding(self._model):
            while waiting or batch.rows:
                self._on_progress(f"{len(batch.rows)} completions decode, {len(waiting)} wait")
                start = time.perf_counter()
                room = self._max_batch_size - len(batch.rows)
                if waiting and room >= min(len(waiting), max(1, self._max_batch_size // _ADMISSION_DIVISOR)):
                    batch.admit([waiting.popleft() for _ in range(min(room, len(waiting)))])
                    seconds["prefill"] += time.perf_counter() - start
                else:
                    batch.step()
                    seconds["decode"] += time.perf_counter() - start
                self._peak_cache_bytes = max(self._peak_cache_bytes, batch.cache_bytes)
                finished += batch.release()
        self.work = SamplingWork(
            prompts.num_tokens, batch.num_decoded_rows, batch.num_steps, seconds["prefill"], seconds["decode"]
        )
        return finished

    def _completion(self, row: Row, policy_version: int) -> Completion:
        assert row.finish_reason is not None, "a row leaves the batch only when it is finished"
        return Completion(
            token_ids=torch.tensor(row.sampled_ids, dtype=torch.int64),
            rollout_logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            temperature=self._temperature,
            finish_reason=row.finish_reason,
            seed=row.request.seed,
            policy_version=policy_version,
        )


def _require_agreement(rows: Sequence[Row], layout: Layout) -> None:
    """Raise if tensor-parallel ranks, which sample independently from the same logits, have different tokens."""
    if layout.tp == 1:
        return
    ids = sorted((row.index, row.sampled_ids) for row in rows)
    digests: list[str] = [""] * layout.tp
    dist.all_gather_object(digests, hashlib.sha256(repr(ids).encode()).hexdigest(), group=layout.tp_group)
    ranks = dist.get_process_group_ranks(layout.tp_group)
    different = [rank for rank, digest in zip(ranks, digests, strict=True) if digest != digests[0]]
    if different:
        first = ranks[0]
        raise RuntimeError(
            f"ranks {different} sampled other tokens than rank {first} from the same logits, so one of their devices "
            "computes wrongly: run again without them"
        )
