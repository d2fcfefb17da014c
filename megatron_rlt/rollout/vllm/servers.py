"""Sampling with vLLM servers: the first rank asks, and all ranks get the completions as they come.

One request a question, with as many completions as its group has. Answers do not depend on the order in which they
arrive: a completion follows from the weights, its prompt, its group's seed and its place in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.models.flops import sampling_flops
from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.platform import world
from megatron_rlt.rollout.requests import Arrival, SampleRequest
from megatron_rlt.rollout.vllm.client import EngineLostError, ServedChoice, VllmServer
from megatron_rlt.rollout.vllm.pending_requests import Answer, OpenQuestions, WorkClock
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.start_server import start_server
from megatron_rlt.rollout.vllm.transfer.direct import BroadcastTransport, IpcTransport
from megatron_rlt.rollout.vllm.transfer.files import FileTransport, WeightTransport
from megatron_rlt.types import Completion, OnProgress, tell_nobody

T = TypeVar("T")


class ServedEngine:
    """Servers that hold a copy of the policy. All methods are collective over all ranks."""

    def __init__(
        self,
        shape: EngineShape,
        architecture: Architecture,
        sampling: Sampling,
        *,
        server: VllmServerConfig,
        folder: Path,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """Start the servers, or find them.

        Args:
            folder: of the run: logs of the servers, and weights on their way unless `transfer_dir` is set.

        Raises:
            EngineLostError: a server does not start or does not answer.
            ValueError: a server at an address serves something else.
        """
        self._shape, self._architecture, self._sampling, self._config = shape, architecture, sampling, server
        self._logs = folder / "vllm"
        self._transport = _transport(shape, folder, on_progress)
        self._on_progress = on_progress
        self._servers: list[VllmServer] = []  # on the first rank
        self._lost: set[int] = set()  # there: servers that failed, whatever they say of themselves
        self._requests: Sequence[SampleRequest] = ()  # of the rollout that runs
        self._parts: Sequence[range] = ()  # of these
        self._questions: OpenQuestions | None = None  # there: what these ask
        self._work = WorkClock()  # there
        self._do(self._connect, "starting vLLM's servers")

    @property
    def is_own(self) -> bool:
        """Whether the job starts its servers, and may start them again."""
        return not self._config.addresses

    def restart(self) -> None:
        """Start every server again that has ended or failed; its weights are those of the folder."""
        self._do(self._revive, "starting vLLM's servers again")

    def start(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        """Ask for completions without waiting for them.

        Args:
            policy_version: what the last `load_weights` called the weights.
            parts: requests whose completions are wanted together, all requests in order; groups stay whole.

        Raises:
            EngineLostError: a server does not answer or has other weights; nothing was asked.
        """
        self._requests, self._parts = requests, parts
        self._do(lambda: self._begin(requests, policy_version, parts), "questions to vLLM's servers")

    def ask_again(self, policy_version: int) -> None:
        """Ask for all that has no answer yet, with the weights of now."""
        self._do(lambda: self._ask_again(policy_version), "open questions to vLLM's servers")

    def arrivals(self) -> tuple[Arrival, ...]:
        """Wait for completions; returns all parts that are there and were not given, none once all were given.

        Raises:
            EngineLostError: some questions were not answered. Those that were are kept; `ask_again` asks for the rest.
        """
        taken = self._do(self._take, f"{len(self._requests)} completions asked of vLLM's servers")
        return tuple(Arrival(index, self._complete(self._parts[index], answers)) for index, answers in taken)

    def take_work_seconds(self) -> float:
        """Seconds since the last call in which servers had something to do; the same on every rank."""
        return self._do(self._work.take, "a clock")

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of every server, and forget what the old ones cached.

        Raises:
            EngineLostError: on every rank: some server may have weights of two versions.
        """
        self._transport.send(tensors, self._servers, self._lost, version)

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        """Of those of the named weights that each worker holds whole and as they came; none of servers at addresses."""
        if not self.is_own:
            return []
        return self._do(lambda: [held for one in self._servers for held in one.checksums_held(names)], "checksums")

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """`[S, T - 1]` float32: of every server, log-probs of all tokens but the first, at temperature 1."""
        return torch.tensor(self._do(lambda: [one.prompt_logprobs(token_ids) for one in self._servers], "a probe"))

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """As `SamplingEngine.model_flops`."""
        return sampling_flops(self._architecture, prompts, [len(completion.token_ids) for completion in completions])

    def _do(self, work: Callable[[], T], doing: str) -> T:
        return on_first_rank(work, world(), self._on_progress, doing)

    def _connect(self) -> None:
        if not self.is_own:
            file = self._config.api_key_file
            key = None if file is None else file.read_text(encoding="utf-8").strip()
            seconds = self._config.request_timeout_seconds
            self._servers = [
                VllmServer(address, api_key=key, timeout_seconds=seconds, process=None)
                for address in self._config.addresses
            ]
            for one in self._servers:
                one.check_model(self._shape.max_tokens)
            return
        for number in range(len(self._config.devices)):
            self._servers.append(self._start(number))

    def _start(self, number: int) -> VllmServer:
        return start_server(
            self._shape,
            log_file=self._logs / f"server-{number}.log",
            devices=self._config.devices[number],
            start_timeout_seconds=self._config.start_timeout_seconds,
            request_timeout_seconds=self._config.request_timeout_seconds,
        )

    def _revive(self) -> None:
        for number, one in enumerate(self._servers):
            if number in self._lost or not one.answers():
                one.close()
                self._servers[number] = self._start(number)
        self._lost = set()

    def _begin(self, requests: Sequence[SampleRequest], policy_version: int, parts: Sequence[range]) -> None:
        for one in self._servers:
            self._require_version(one, policy_version)
        groups: list[range] = []  # of requests
        numbers: list[range] = []  # of each part's groups
        for part in parts:
            within = _groups(requests, part)
            numbers.append(range(len(groups), len(groups) + len(within)))
            groups += within
        if self._questions is not None:
            self._questions.close()
        self._questions = OpenQuestions(
            lambda number: self._ask_group(number, requests, groups[number]),
            numbers,
            self._work,
            max_concurrent=self._config.max_concurrent_requests,
        )
        self._questions.ask(policy_version)

    def _ask_again(self, policy_version: int) -> None:
        assert self._questions is not None, "a rollout has begun"
        self._questions.ask(policy_version)

    def _take(self) -> list[tuple[int, list[Answer]]]:
        """By part."""
        questions = self._questions
        assert questions is not None, "a rollout has begun"
        complete = questions.wait()
        for one in self._servers:
            try:
                self._require_version(one, questions.policy_version)
            except _OtherWeightsError:
                questions.forget(complete)
                raise
            except EngineLostError:
                continue  # its answers are here; that it is gone is noticed when it is next asked
        return [(index, questions.give(index)) for index in complete]

    def _complete(self, part: range, answers: Sequence[Answer]) -> tuple[Completion, ...]:
        choices = [(choice, answer.policy_version) for answer in answers for choice in answer.choices]
        return tuple(
            self._sampling.completion(
                choice.token_ids, choice.logprobs, choice.finish_reason, self._requests[index], version
            )
            for index, (choice, version) in zip(part, choices, strict=True)
        )

    def _ask_group(self, number: int, requests: Sequence[SampleRequest], group: range) -> list[ServedChoice]:
        first, place = requests[group.start], number % len(self._servers)
        server, prompt, settings = self._servers[place], first.token_ids.tolist(), self._sampling.settings()
        for retries_left in reversed(range(self._config.max_retries + 1)):
            try:
                return server.complete(prompt, settings, n=len(group), seed=first.seed)
            except EngineLostError:
                if retries_left == 0 or not server.answers():
                    self._lost.add(place)
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _require_version(self, server: VllmServer, policy_version: int) -> None:
        """Nobody else may have changed a server's weights."""
        found = server.weight_version()
        if found != str(policy_version):
            raise _OtherWeightsError(f"{server.address} has weights of version {found}, not {policy_version}")


class _OtherWeightsError(EngineLostError):
    """A server has been given other weights than those it is asked with."""


def _transport(shape: EngineShape, folder: Path, on_progress: OnProgress) -> WeightTransport:
    """The configured way of weights to servers."""
    server, backend = shape.settings.server, shape.transfer_backend
    if backend is None:
        through = folder if server.transfer_dir is None else server.transfer_dir
        return FileTransport(shape.folder, through / "weight_sync", on_progress)
    way = IpcTransport if backend == "ipc" else BroadcastTransport
    return way(backend, server.bucket_bytes, server.request_timeout_seconds, on_progress)


def _groups(requests: Sequence[SampleRequest], part: range) -> list[range]:
    """Neighbours with one prompt, in a part of the requests."""
    starts = [
        index
        for index in part
        if index == part.start or not torch.equal(requests[index].token_ids, requests[index - 1].token_ids)
    ]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], part.stop], strict=True)]
