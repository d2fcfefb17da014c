"""Sampling engines with weights of their own that follow the policy: sync where it changed, then sample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.failures import StoppedError
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.vllm_engine import VllmEngine
from megatron_rlt.rollout.vllm_model import VllmModel
from megatron_rlt.rollout.vllm_served import ServedEngine
from megatron_rlt.rollout.vllm_server import EngineLostError
from megatron_rlt.types import Completion
from megatron_rlt.weight_sync.sync import SyncReport, WeightSync


class ColocatedVllm:
    """vLLM in the trainer's ranks, always at the policy's version when it samples."""

    def __init__(self, model: VllmModel, engine: VllmEngine, sync: WeightSync) -> None:
        """The model has no weights yet: the first `generate` brings them."""
        self._model, self._engine, self._sync = model, engine, sync
        self._version: int | None = None
        self._report: SyncReport | None = None
        model.sleep()

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """As `SamplingEngine.generate`; raises StoppedError if the engine does not have the policy's weights."""
        self._model.wake()
        if self._version != policy_version or not self._model.keeps_weights:
            self._report = self._sync.push(policy_version)
            self._version = policy_version
        completions = self._engine.generate(requests, policy_version)
        self._model.sleep()
        return completions

    def prompt_logprobs(self, token_ids: Tensor) -> Tensor:
        """`[T - 1]`: what it says, asked for a prompt's log-probs, of all tokens but the first, at temperature 1.

        With the weights of the last `generate`. Collective; the first rank's answer, on every rank.
        """
        self._model.wake()
        found = self._model.prompt_logprobs(token_ids.tolist())[0]
        self._model.sleep()
        return broadcast_record(found, source_rank=0, group=world())

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """As `SamplingEngine.model_flops`."""
        return self._engine.model_flops(prompts, completions)

    def take_peak_cache_bytes(self) -> int:
        """The key-value cache is one block, always of one size."""
        return self._model.cache_bytes

    def take_metrics(self) -> dict[str, float]:
        """Of the weight sync since the last call; none, if the policy did not change."""
        report, self._report = self._report, None
        return {} if report is None else report.metrics()


class ServedVllm:
    """vLLM servers, always at the policy's version when they sample; started again if they are lost."""

    def __init__(self, engine: ServedEngine, sync: WeightSync, *, max_restarts: int) -> None:
        """
        Args:
            max_restarts: within one `generate`.
        """
        self._engine, self._sync, self._max_restarts = engine, sync, max_restarts
        self._version: int | None = None
        self._report: SyncReport | None = None
        self._num_restarts = 0

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """As `SamplingEngine.generate`.

        Raises:
            StoppedError: the servers do not have the policy's weights, or were lost more often than is allowed.
        """
        for restarts_left in reversed(range(self._max_restarts + 1)):
            try:
                if self._version != policy_version:
                    self._report = self._sync.push(policy_version)
                    self._version = policy_version
                return self._engine.generate(requests, policy_version)
            except EngineLostError as error:
                self._version = None
                if restarts_left == 0 or not self._engine.is_own:
                    raise StoppedError(f"the sampling engine is lost, and no update was made: {error}") from error
                self._restart()
        raise AssertionError("the last attempt returns or raises")

    def prompt_logprobs(self, token_ids: Tensor) -> Tensor:
        """As `ColocatedVllm.prompt_logprobs`; the first server's answer."""
        return self._engine.prompt_logprobs(token_ids.tolist())[0]

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """As `SamplingEngine.model_flops`."""
        return self._engine.model_flops(prompts, completions)

    def take_peak_cache_bytes(self) -> int:
        """The cache lives on the servers."""
        return 0

    def take_metrics(self) -> dict[str, float]:
        """Of the weight sync since the last call, if the policy changed, and of servers that had to start again."""
        report, self._report = self._report, None
        restarts, self._num_restarts = self._num_restarts, 0
        return {"engine_restarts": float(restarts)} | ({} if report is None else report.metrics())

    def _restart(self) -> None:
        self._num_restarts += 1
        try:
            self._engine.restart()
        except EngineLostError as error:
            raise StoppedError(f"the sampling engine was lost and does not start again: {error}") from error
