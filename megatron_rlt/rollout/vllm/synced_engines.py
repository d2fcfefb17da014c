"""Sampling engines with weights of their own that follow the policy: sync where it changed, then sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import Arrival, SampleRequest
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.colocated import VllmEngine
from megatron_rlt.rollout.vllm.model import VllmModel
from megatron_rlt.rollout.vllm.servers import ServedEngine
from megatron_rlt.rollout.weight_sync.sync import SyncReport, WeightSync
from megatron_rlt.types import Completion, StoppedError

T = TypeVar("T")


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
    """vLLM servers, at the policy's version when they are asked; started again if they are lost.

    They sample while the caller does something else: `start`, then `arrivals` until all parts have come.
    """

    def __init__(self, engine: ServedEngine, sync: WeightSync, *, max_restarts: int) -> None:
        """
        Args:
            max_restarts: within one rollout.
        """
        self._engine, self._sync, self._max_restarts = engine, sync, max_restarts
        self._version: int | None = None
        self._restarts_left = max_restarts
        self._report: SyncReport | None = None
        self._num_restarts = 0
        self._num_tokens = 0
        self._waited_seconds, self._measured_since = 0.0, time.monotonic()

    def start(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        """Bring the servers to the policy's weights and ask them. Collective; all earlier completions must have come.

        Args:
            parts: requests whose completions are wanted together, all requests in order; groups stay whole.

        Raises:
            StoppedError: the servers do not have the policy's weights, or were lost more often than is allowed.
        """
        self._restarts_left = self._max_restarts

        def ask() -> None:
            self._follow(policy_version)
            self._engine.start(requests, policy_version, parts)

        self._persist(ask)

    def arrivals(self, policy_version: int) -> tuple[Arrival, ...]:
        """Wait until a part has come; returns all that have, none once all were returned. Collective.

        Args:
            policy_version: which weights the policy has now. Servers that were lost are started again with these, and
                asked for the completions that have not come.

        Raises:
            StoppedError: as `start`.
        """
        start = time.monotonic()

        def wait() -> tuple[Arrival, ...]:
            if self._version is None:
                self._follow(policy_version)
                self._engine.ask_again(policy_version)
            return self._engine.arrivals()

        arrivals = self._persist(wait)
        self._num_tokens += sum(len(one.token_ids) for arrival in arrivals for one in arrival.completions)
        self._waited_seconds += time.monotonic() - start
        return arrivals

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """As `SamplingEngine.generate`; raises as `start`."""
        self.start(requests, policy_version, [range(len(requests))])
        (arrival,) = self.arrivals(policy_version)
        return list(arrival.completions)

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
        """Of the weight sync since the last call, if the policy changed, of servers that had to start again, and of
        the time since the last call: which share of it trainer and servers had nothing to do but wait."""
        report, self._report = self._report, None
        restarts, self._num_restarts = self._num_restarts, 0
        return {"engine_restarts": float(restarts)} | self._take_shares() | ({} if report is None else report.metrics())

    def _take_shares(self) -> dict[str, float]:
        worked, now = self._engine.take_work_seconds(), time.monotonic()
        seconds, self._measured_since = now - self._measured_since, now
        waited, self._waited_seconds = self._waited_seconds, 0.0
        num_tokens, self._num_tokens = self._num_tokens, 0
        shares = {"idle_share/trainer": waited / seconds, "idle_share/engine": 1.0 - worked / seconds}
        if worked > 0:  # tokens that came, though some may have been sampled before
            shares["engine_tokens_per_second"] = num_tokens / worked
        return broadcast_record(shares, source_rank=0, group=world())  # ranks' clocks differ a little

    def _follow(self, policy_version: int) -> None:
        if self._version != policy_version:
            self._report = self._sync.push(policy_version)
            self._version = policy_version

    def _persist(self, work: Callable[[], T]) -> T:
        """Do it, with servers started again as often as is allowed. Whatever they had been given is gone then."""
        while True:
            try:
                return work()
            except EngineLostError as error:
                self._version = None
                if self._restarts_left == 0 or not self._engine.is_own:
                    raise StoppedError(f"the sampling engine is lost, and no update was made: {error}") from error
                self._restarts_left -= 1
                self._restart()

    def _restart(self) -> None:
        self._num_restarts += 1
        try:
            self._engine.restart()
        except EngineLostError as error:
            raise StoppedError(f"the sampling engine was lost and does not start again: {error}") from error
