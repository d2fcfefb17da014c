"""Where a job's vLLM servers come from: the first rank starts them, a step of the job's own does, or they run already.

Used on the first rank alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.config.server_access import read_key
from megatron_rlt.parallel.environment import ServerStep, server_step
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.require_key import WORD as REQUIRE_KEY
from megatron_rlt.rollout.vllm.server_step import StepFolder, StepServer
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import start_server

T = TypeVar("T")

_POLL_SECONDS = 0.5
# A step says itself that a start took too long; this much later its silence is a fault of its own.
_LATE_SECONDS = 120.0


class ServerSource(Protocol):
    """Hands out a job's servers."""

    are_own: bool
    """Whether they are this job's: lost ones come back, and their workers run this project's inspector."""

    def connect(self) -> list[ServerClient]:
        """All servers.

        Raises:
            EngineLostError: a server does not start or does not answer.
            ValueError: a server serves another model, or answers without the key.
        """

    def replace(self, number: int, lost: ServerClient) -> ServerClient:
        """Another server in the place of a lost one, with the weights of the model's folder; raises as `connect`."""


def server_source(shape: EngineShape, log_folder: Path) -> ServerSource:
    """The source that the configuration and the job's launcher name."""
    if shape.settings.server.addresses:
        return GivenServers(shape)
    step = server_step()
    return StartedServers(shape, log_folder) if step is None else StepServers(shape, step)


class StartedServers(ServerSource):
    """Servers that this rank starts on its machine."""

    are_own = True

    def __init__(self, shape: EngineShape, log_folder: Path) -> None:
        self._shape, self._log_folder = shape, log_folder

    def connect(self) -> list[ServerClient]:
        return [self._start(number) for number in range(len(self._shape.settings.server.devices))]

    def replace(self, number: int, lost: ServerClient) -> ServerClient:
        lost.close()
        return self._start(number)

    def _start(self, number: int) -> ServerClient:
        devices = self._shape.settings.server.devices[number]
        return start_server(self._shape, log_file=self._log_folder / f"server-{number}.log", devices=devices)


class GivenServers(ServerSource):
    """Servers at the configured addresses, which are not this job's."""

    are_own = False

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape

    def connect(self) -> list[ServerClient]:
        config = self._shape.settings.server
        key = None if config.api_key_file is None else read_key(config.api_key_file)
        return [_reached(address, key, config, self._shape.max_tokens) for address in config.addresses]

    def replace(self, number: int, lost: ServerClient) -> ServerClient:
        raise AssertionError(f"{lost.address}, number {number}, is not this job's")


class StepServers(ServerSource):
    """Servers of the job's own Slurm step, on nodes of their own."""

    are_own = True

    def __init__(self, shape: EngineShape, step: ServerStep) -> None:
        self._shape, self._config = shape, shape.settings.server
        self._folder, self._nodes = StepFolder(step.folder), range(step.num_nodes)
        self._known: list[StepServer] = []

    def connect(self) -> list[ServerClient]:
        def all_servers() -> list[StepServer] | None:
            by_node = [self._folder.servers(node) for node in self._nodes]
            found = [one for servers in by_node for one in servers or ()]
            ready = None not in by_node and all(one.address is not None for one in found)
            return found if ready else None

        self._known = self._wait_for(all_servers, "a server of the job's own step")
        return [self._reached(one) for one in self._known]

    def replace(self, number: int, lost: ServerClient) -> ServerClient:
        lost.close()
        known = self._known[number]
        self._folder.give_up(known)

        def another() -> StepServer | None:
            found = (self._folder.servers(known.node) or ())[known.place]
            return found if found.start > known.start and found.address is not None else None

        self._known[number] = self._wait_for(another, f"another server in the place of {known.address}")
        return self._reached(self._known[number])

    def _reached(self, server: StepServer) -> ServerClient:
        assert server.address is not None, "it was waited for"
        return _reached(server.address, self._folder.key(), self._config, self._shape.max_tokens)

    def _wait_for(self, look: Callable[[], T | None], what: str) -> T:
        deadline = time.monotonic() + self._config.start_timeout_seconds + _LATE_SECONDS
        while (found := look()) is None:
            if (why := self._folder.failure()) is not None:
                raise EngineLostError(why)
            if time.monotonic() > deadline:
                raise EngineLostError(f"waited {self._config.start_timeout_seconds + _LATE_SECONDS:g} s for {what}")
            time.sleep(_POLL_SECONDS)
        return found


def _reached(address: str, key: str | None, config: VllmServerConfig, max_tokens: int) -> ServerClient:
    server = ServerClient(address, api_key=key, timeout_seconds=config.request_timeout_seconds, process=None)
    if not config.allow_unprotected:
        _require_protection(server)
    server.check_model(max_tokens)
    return server


def _require_protection(server: ServerClient) -> None:
    """Whoever reaches a path such as /collective_rpc can replace weights, and with pickled objects run code."""
    found = server.open_paths()
    if found:
        raise ValueError(
            f"rollout.vllm.server.addresses: {server.address} answers {len(found)} paths without the key, such as"
            f" {found[-1]}; start it with VLLM_API_KEY and `--middleware {REQUIRE_KEY}`, or set"
            " rollout.vllm.server.allow_unprotected=true"
        )
