"""Sampling with vLLM servers: sync the weights if the policy changed, then sample; restart servers that are lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import Arrival, SampleRequest, SamplingEngine
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.servers import VllmServers
from megatron_rlt.rollout.weight_sync.sync import WeightSync
from megatron_rlt.types import Completion, StoppedError

T = TypeVar("T")


class ServerEngine(SamplingEngine):
    """vLLM servers that have the policy's weights whenever they are asked."""

    def __init__(
        self, servers: VllmServers, sync: WeightSync, architecture: Architecture, *, max_restarts: int
    ) -> None:
        """`max_restarts`: restarts of lost servers allowed per rollout."""
        self.architecture = architecture
        self._servers, self._sync, self._max_restarts = servers, sync, max_restarts
        self._restarts_left = max_restarts
        self._num_restarts = 0
        self._num_tokens = 0
        self._waited_seconds, self._measured_since = 0.0, time.monotonic()

    def start(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        """Sync the servers' weights and send the requests; `arrivals` returns the completions. Collective.

        Args:
            parts: indices of the requests whose completions are wanted together, all requests in order; groups stay
                whole. All parts of the previous `start` must have arrived.

        Raises:
            StoppedError: the servers do not have the policy's weights, or were lost more often than is allowed.
        """
        self._restarts_left = self._max_restarts

        def send() -> None:
            self._sync.ensure(policy_version)
            self._servers.start(requests, policy_version, parts)

        self._persist(send)

    def arrivals(self, policy_version: int) -> tuple[Arrival, ...]:
        """Wait until a part has arrived; returns all that have, none once all were returned. Collective.

        Lost servers are restarted with the policy's current weights, of `policy_version`, and sent the requests whose
        completions are missing. Raises as `start`.
        """
        start = time.monotonic()

        def wait() -> tuple[Arrival, ...]:
            if self._sync.version is None:
                self._sync.ensure(policy_version)
                self._servers.send_again(policy_version)
            return self._servers.arrivals()

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
        """As `ColocatedEngine.prompt_logprobs`; the first server's answer."""
        return self._servers.prompt_logprobs(token_ids.tolist())[0]

    def take_peak_cache_bytes(self) -> int:
        """As `SamplingEngine.take_peak_cache_bytes`: the KV cache is in the servers, so none is on this rank."""
        return 0

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the previous call: weight sync (if the policy changed), restarts, idle shares, tokens/s."""
        restarts, self._num_restarts = self._num_restarts, 0
        return {"engine_restarts": float(restarts)} | self._take_shares() | self._sync.take_metrics()

    def _take_shares(self) -> dict[str, float]:
        """Shares of the time since the previous call in which the trainer, or the servers, had nothing to do."""
        busy, now = self._servers.take_busy_seconds(), time.monotonic()
        seconds, self._measured_since = now - self._measured_since, now
        waited, self._waited_seconds = self._waited_seconds, 0.0
        num_tokens, self._num_tokens = self._num_tokens, 0
        shares = {"idle_share/trainer": waited / seconds, "idle_share/engine": 1.0 - busy / seconds}
        if busy > 0:  # tokens that arrived, though some may have been sampled before
            shares["engine_tokens_per_second"] = num_tokens / busy
        return broadcast_record(shares, source_rank=0, group=world())  # ranks' clocks differ a little

    def _persist(self, work: Callable[[], T]) -> T:
        """Do `work`, after each loss again on restarted servers; they have lost all requests they were sent."""
        while True:
            try:
                return work()
            except EngineLostError as error:
                self._sync.invalidate()
                if self._restarts_left == 0 or not self._servers.are_own:
                    raise StoppedError(f"the sampling engine is lost, and no update was made: {error}") from error
                self._restarts_left -= 1
                self._restart()

    def _restart(self) -> None:
        self._num_restarts += 1
        try:
            self._servers.restart()
        except EngineLostError as error:
            raise StoppedError(f"the sampling engine was lost and does not start again: {error}") from error
