"""Sampling with vLLM inside the trainer's ranks: sync the weights if the policy changed, then sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.parallel.collectives import broadcast_record, gather_by_index
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import SampleRequest, SamplingEngine
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.rollout.weight_sync.sync import WeightSync
from megatron_rlt.types import Completion, OnProgress, tell_nobody


class ColocatedEngine(SamplingEngine):
    """vLLM in the trainer's ranks; asleep while the trainer works."""

    def __init__(
        self,
        model: VllmModel,
        sync: WeightSync,
        architecture: Architecture,
        sampling: Sampling,
        *,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """
        Args:
            model: still without weights: the first `generate` sends them.
            on_progress: called after every decoding step of the batch.
        """
        self.architecture = architecture
        self._model, self._sync, self._sampling, self._on_progress = model, sync, sampling, on_progress
        model.sleep()

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """As `SamplingEngine.generate`.

        Raises:
            StoppedError: the engine does not have the policy's weights.
            RuntimeError: the ranks of an engine sampled different tokens, or vLLM ended a completion where this
                project's stop condition would go on.
        """
        self._model.wake()
        if not self._model.keeps_weights:
            self._sync.invalidate()
        self._sync.ensure(policy_version)
        num_engines, engine = dist.get_world_size() // self._model.tp, dist.get_rank() // self._model.tp
        # Contiguous shares keep a group's equal prompts on one engine, whose prefix cache holds them.
        mine = range(len(requests) * engine // num_engines, len(requests) * (engine + 1) // num_engines)
        outputs = self._sample([requests[index] for index in mine])
        completions = {
            index: self._completion(output, requests[index], policy_version)
            for index, output in zip(mine, outputs, strict=True)
        }
        _require_agreement(completions, self._model.tp)
        self._model.sleep()
        is_first = dist.get_rank() % self._model.tp == 0
        return gather_by_index(completions if is_first else {}, len(requests), world())

    def prompt_logprobs(self, token_ids: Tensor) -> Tensor:
        """`[T - 1]` log-probs of all tokens but the first, at temperature 1, by the first rank's engine. Collective."""
        self._model.wake()
        found = self._model.prompt_logprobs(token_ids.tolist())[0]
        self._model.sleep()
        return broadcast_record(found, source_rank=0, group=world())

    def take_peak_cache_bytes(self) -> int:
        """As `SamplingEngine.take_peak_cache_bytes`: the KV cache is one block of constant size."""
        return self._model.cache_bytes

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the weight sync since the previous call; empty if the policy did not change."""
        return self._sync.take_metrics()

    def _sample(self, requests: Sequence[SampleRequest]) -> list[Any]:
        """vLLM's output for each request of this engine, in order."""
        settings = self._sampling.settings()
        params = [self._model.sampling_params(**settings, seed=request.seed) for request in requests]
        if requests:
            self._model.enqueue([request.token_ids.tolist() for request in requests], params)
        finished: dict[int, Any] = {}
        while self._model.has_unfinished():
            self._on_progress(f"{len(finished)} of {len(requests)} completions have ended")
            ended: list[Any] = self._model.step()
            # vLLM numbers requests as they come.
            finished.update({int(output.request_id): output.outputs[0] for output in ended})
        return [finished[number] for number in sorted(finished)]

    def _completion(self, output: Any, request: SampleRequest, policy_version: int) -> Completion:  # noqa: ANN401
        ids = list(output.token_ids)
        logprobs = [row[token].logprob for row, token in zip(output.logprobs, ids, strict=True)]
        return self._sampling.completion(ids, logprobs, output.finish_reason, request, policy_version)


def _require_agreement(completions: dict[int, Completion], tp: int) -> None:
    """Each rank of an engine draws the same tokens by itself; one that computes wrongly must not go unnoticed."""
    ids = [(index, completion.token_ids.tolist()) for index, completion in sorted(completions.items())]
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(ids).encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[rank - rank % tp]]
    if different:
        raise RuntimeError(
            f"ranks {different} sampled other tokens with vLLM than the first rank of their engine from the same"
            " weights, so one of their devices computes wrongly: run again without them"
        )
