"""Sampling with vLLM in the trainer's ranks: requests in, completions out, as the embedded engine does it.

Every engine (`tp` neighbouring ranks) samples its share of the requests. A completion's randomness comes from its seed
alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.flops import sampling_flops
from megatron_rlt.parallel.collectives import gather_by_index
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.settings import Sampling
from megatron_rlt.types import Completion, OnProgress, tell_nobody


class VllmEngine:
    """Samples completions from whatever weights its `VllmModel` has at the call."""

    def __init__(
        self,
        model: VllmModel,
        architecture: Architecture,
        sampling: Sampling,
        *,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """
        Args:
            on_progress: told of every token that the batch grows by.
        """
        self._model, self._architecture, self._sampling = model, architecture, sampling
        self._on_progress = on_progress

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """Continue every prompt; as `SamplingEngine.generate`.

        Raises:
            RuntimeError: the ranks of an engine sampled different tokens, or vLLM ended a completion for no reason that
                this project knows.
        """
        num_engines, engine = dist.get_world_size() // self._model.tp, dist.get_rank() // self._model.tp
        # Contiguous shares keep a group's equal prompts on one engine, whose prefix cache holds them.
        mine = range(len(requests) * engine // num_engines, len(requests) * (engine + 1) // num_engines)
        outputs = self._sample([requests[index] for index in mine])
        completions = {
            index: self._completion(output, requests[index], policy_version)
            for index, output in zip(mine, outputs, strict=True)
        }
        _require_agreement(completions, self._model.tp)
        is_first = dist.get_rank() % self._model.tp == 0
        return gather_by_index(completions if is_first else {}, len(requests), world())

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """As `SamplingEngine.model_flops`."""
        return sampling_flops(self._architecture, prompts, [len(completion.token_ids) for completion in completions])

    def _sample(self, requests: Sequence[SampleRequest]) -> list[Any]:
        """vLLM's output of each request of this engine, in order."""
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
    """The ranks of an engine draw their tokens each for itself: one that computes wrongly must not go unnoticed."""
    ids = [(index, completion.token_ids.tolist()) for index, completion in sorted(completions.items())]
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(ids).encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[rank - rank % tp]]
    if different:
        raise RuntimeError(
            f"ranks {different} sampled other tokens with vLLM than the first rank of their engine from the same"
            " weights, so one of their devices computes wrongly: run again without them"
        )
