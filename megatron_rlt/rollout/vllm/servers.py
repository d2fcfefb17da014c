"""The job's vLLM servers as one: the first rank sends them requests, and all ranks get the completions as they arrive.

One request per prompt, for all completions of its group. Completions do not depend on the order in which answers
arrive: each follows from the weights, its prompt, its group's seed and its index in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import Arrival, SampleRequest
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient, ServerCompletion
from megatron_rlt.rollout.vllm.pending_requests import Answer, BusyClock, PendingRequests
from megatron_rlt.rollout.vllm.server_sources import server_source
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.types import Completion, OnProgress, tell_nobody

T = TypeVar("T")


class WeightTransport(Protocol):
    """A way to send weights to servers."""

    def send(self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[ServerClient], version: int) -> None:
        """Replace the weights of every server and drop the caches of the old ones. Collective over all ranks.

        Every rank exhausts the tensors, also if the transfer fails. `servers` is empty except on the first rank; one
        that must restart before it is asked again is marked `is_lost`.

        Raises:
            EngineLostError: on every rank: some server may have weights of two versions.
            ValueError: a server was not started for this transport.
        """


class VllmServers:
    """vLLM servers that hold a copy of the policy each. All methods are collective over all ranks."""

    def __init__(
        self,
        shape: EngineShape,
        sampling: Sampling,
        transport: WeightTransport,
        *,
        log_folder: Path,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """Start the servers, or connect to those of the job's own step or at the configured addresses.

        Raises:
            EngineLostError: a server does not start or does not answer.
            ValueError: a server at an address serves another model, or answers without the key.
        """
        self._config, self._sampling = shape.settings.server, sampling
        self._transport, self._on_progress = transport, on_progress
        self._source = server_source(shape, log_folder)  # the same kind on every rank
        self._servers: list[ServerClient] = []  # on the first rank
        self._requests: Sequence[SampleRequest] = ()  # of the current rollout
        self._parts: Sequence[range] = ()  # of these
        self._pending: PendingRequests | None = None  # on the first rank
        self._clock = BusyClock()  # on the first rank
        self._do(self._connect, "starting vLLM's servers")

    @property
    def are_own(self) -> bool:
        """Whether the servers are the job's own, and lost ones are started again."""
        return self._source.are_own

    def restart(self) -> None:
        """Restart every server that has ended or failed, with the weights of the model's folder."""
        self._do(self._revive, "starting vLLM's servers again")

    def start(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        """Send requests without waiting for their answers; `parts` as in `ServerEngine.start`.

        Raises EngineLostError, with nothing sent, if a server does not answer or its weights are not `policy_version`.
        """
        self._requests, self._parts = requests, parts
        self._do(lambda: self._begin(requests, policy_version, parts), "requests to vLLM's servers")

    def send_again(self, policy_version: int) -> None:
        """Send all requests that have no answer yet, for the current weights."""
        self._do(lambda: self._rollout.send(policy_version), "pending requests to vLLM's servers")

    def arrivals(self) -> tuple[Arrival, ...]:
        """Wait for completions; returns all parts that are complete and new, none once all were returned.

        Raises EngineLostError if requests were not answered. Answers are kept; `send_again` sends the rest.
        """
        popped = self._do(self._pop, f"{len(self._requests)} completions asked of vLLM's servers")
        return tuple(Arrival(index, self._complete(self._parts[index], answers)) for index, answers in popped)

    def take_busy_seconds(self) -> float:
        """Seconds since the previous call in which a request was pending, the same on every rank."""
        return self._do(self._clock.pop, "a clock")

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of every server and drop the caches of the old ones; raises as `WeightTransport.send`."""
        self._transport.send(tensors, self._servers, version)

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        """For each worker, checksums of the named weights that it holds as sent; empty for servers at addresses."""
        if not self.are_own:
            return []
        return self._do(lambda: [held for one in self._servers for held in one.checksums_held(names)], "checksums")

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """`[S, T - 1]` float32: each server's log-probs of all tokens but the first, at temperature 1."""
        return torch.tensor(self._do(lambda: [one.prompt_logprobs(token_ids) for one in self._servers], "a probe"))

    def _do(self, work: Callable[[], T], doing: str) -> T:
        return on_first_rank(work, world(), self._on_progress, doing)

    def _connect(self) -> None:
        self._servers.extend(self._source.connect())

    def _revive(self) -> None:
        for number, one in enumerate(self._servers):
            if one.is_lost or not one.answers():
                self._servers[number] = self._source.replace(number, one)

    def _begin(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        for one in self._servers:
            _require_version(one, policy_version)
        groups: list[range] = []  # of requests
        numbers: list[range] = []  # of each part's groups
        for part in parts:
            within = _groups(requests, part)
            numbers.append(range(len(groups), len(groups) + len(within)))
            groups += within
        if self._pending is not None:
            self._pending.close()
        self._pending = PendingRequests(
            lambda number: self._sample(number, requests, groups[number]),
            numbers,
            self._clock,
            max_concurrent=self._config.max_concurrent_requests,
        )
        self._pending.send(policy_version)

    @property
    def _rollout(self) -> PendingRequests:
        assert self._pending is not None, "a rollout has begun"
        return self._pending

    def _pop(self) -> list[tuple[int, list[Answer]]]:
        """Answers by part."""
        rollout = self._rollout
        complete = rollout.wait()
        for one in self._servers:
            try:
                _require_version(one, rollout.policy_version)
            except _OtherWeightsError:
                rollout.discard(complete)
                raise
            except EngineLostError:
                continue  # its answers are here; that it is gone is noticed when it is next asked
        return [(index, rollout.pop(index)) for index in complete]

    def _complete(self, part: range, answers: Sequence[Answer]) -> tuple[Completion, ...]:
        answered = [(one, answer.policy_version) for answer in answers for one in answer.completions]
        return tuple(
            self._sampling.completion(one.token_ids, one.logprobs, one.finish_reason, self._requests[index], version)
            for index, (one, version) in zip(part, answered, strict=True)
        )

    def _sample(self, number: int, requests: Sequence[SampleRequest], group: range) -> list[ServerCompletion]:
        first, server = requests[group.start], self._servers[number % len(self._servers)]
        prompt, settings = first.token_ids.tolist(), self._sampling.settings()
        for retries_left in reversed(range(self._config.max_retries + 1)):
            try:
                return server.complete(prompt, settings, n=len(group), seed=first.seed)
            except EngineLostError:
                if retries_left == 0 or not server.answers():
                    server.is_lost = True
                    raise
        raise AssertionError("the last attempt returns or raises")


class _OtherWeightsError(EngineLostError):
    """A server has other weights than those that its requests are meant for."""


def _require_version(server: ServerClient, policy_version: int) -> None:
    """Nobody else may have changed a server's weights."""
    found = server.weight_version()
    if found != str(policy_version):
        raise _OtherWeightsError(f"{server.address} has weights of version {found}, not {policy_version}")


def _groups(requests: Sequence[SampleRequest], part: range) -> list[range]:
    """Neighbours with one prompt, in a part of the requests."""
    starts = [
        index
        for index in part
        if index == part.start or not torch.equal(requests[index].token_ids, requests[index - 1].token_ids)
    ]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], part.stop], strict=True)]
