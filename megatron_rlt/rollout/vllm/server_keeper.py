"""Keeps the vLLM servers of one node of a job's server step: starts them, says where they are, starts lost ones again.

It ends when it is told to, at the first start that fails, or when a server is lost again and again: with a reason that
the trainer reads.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlt.parallel.environment import address_for_ranks, free_port, node_name
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.require_key import WORD as REQUIRE_KEY
from megatron_rlt.rollout.vllm.server_process import ServerProcess, private_folder
from megatron_rlt.rollout.vllm.server_step import StepFolder, StepServer
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import command
from megatron_rlt.types import FAILED

_POLL_SECONDS = 1.0
_SETTLED_SECONDS = 900.0  # of answers; a loss after so long has nothing to do with the one before

logger = logging.getLogger(__name__)


def keep_servers(shape: EngineShape, devices: Sequence[str], folder: Path, node: int) -> int:
    """Serve until a SIGTERM. Returns the exit status.

    Args:
        devices: CUDA_VISIBLE_DEVICES of each of this node's servers; empty: this process's.
        folder: of the step.
        node: this node's number in the step.
    """
    os.umask(0o077)  # what is written from here on is the user's alone
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    keeper = _Keeper(shape, devices, StepFolder(folder), node)
    try:
        while not end.wait(_POLL_SECONDS):
            keeper.look()
    except EngineLostError as error:
        keeper.step.fail(str(error))
        logger.error("%s", error)
        return FAILED
    finally:
        keeper.close()
    return 0


@dataclass
class _Kept:
    """A running server: what the trainer may know of it, and this node's end."""

    server: StepServer
    client: ServerClient
    since: float  # when it was started, or first answered
    num_losses: int  # before it, in a row and each soon after it first answered

    @property
    def process(self) -> ServerProcess:
        assert self.client.process is not None, "this process started it"
        return self.client.process


class _Keeper:
    """The servers of this node, in the order of their places."""

    def __init__(self, shape: EngineShape, devices: Sequence[str], step: StepFolder, node: int) -> None:
        self._shape, self._devices, self.step, self._node = shape, devices, step, node
        self._key, self._host = step.key(), address_for_ranks()
        self._ports: set[int] = set()  # of all starts: a port is free until its server listens
        self._servers = [self._start(StepServer(node, place, 1, None), 0) for place in range(len(devices))]
        self._announce()

    def look(self) -> None:
        """See how every server is. Raises EngineLostError if a start failed, or a server was lost too often."""
        for place, kept in enumerate(self._servers):
            if kept.server.address is None:
                self._look_at_start(kept)
            elif not kept.process.is_alive or self.step.is_given_up(kept.server):
                logger.warning("%s is lost: %s", self._name(kept), kept.process.last_words())
                kept.client.close()
                again = replace(kept.server, start=kept.server.start + 1, address=None)
                self._servers[place] = self._start(again, self._count_loss(kept))
                self._announce()

    def close(self) -> None:
        """End all servers."""
        for kept in self._servers:
            kept.client.close()

    def _count_loss(self, kept: _Kept) -> int:
        """How often this place has lost its server in a row, each time soon after it first answered."""
        count = kept.num_losses + 1 if time.monotonic() < kept.since + _SETTLED_SECONDS else 1
        if count > self._shape.settings.server.max_retries:
            raise EngineLostError(
                f"{self._name(kept)} is lost, loss {count} in a row (rollout.vllm.server.max_retries):"
                f" {kept.process.last_words()} (log: {kept.process.log_file})"
            )
        return count

    def _look_at_start(self, kept: _Kept) -> None:
        if not kept.process.is_alive:
            raise EngineLostError(
                f"{self._name(kept)} ended while it started: {kept.process.last_words()} (log: {kept.process.log_file})"
            )
        limit = self._shape.settings.server.start_timeout_seconds
        if kept.client.answers():
            kept.server, kept.since = replace(kept.server, address=kept.client.address), time.monotonic()
            logger.warning("%s answers at %s", self._name(kept), kept.client.address)
            self._announce()
        elif time.monotonic() > kept.since + limit:
            raise EngineLostError(
                f"{self._name(kept)} was not ready after {limit:g} s: {kept.process.last_words()}"
                f" (log: {kept.process.log_file})"
            )

    def _start(self, server: StepServer, num_losses: int) -> _Kept:
        while (port := free_port(self._host)) in self._ports:
            pass
        self._ports.add(port)
        process = ServerProcess(
            command(self._shape, {"host": self._host, "port": port, "middleware": REQUIRE_KEY}),
            folder=private_folder(),
            log_file=self.step.folder / f"server-{self._node}-{server.place}.log",
            devices=self._devices[server.place],
            unpickles=False,
            api_key=self._key,
        )
        address = f"http://[{self._host}]:{port}" if ":" in self._host else f"http://{self._host}:{port}"
        seconds = self._shape.settings.server.request_timeout_seconds
        client = ServerClient(address, api_key=self._key, timeout_seconds=seconds, process=process)
        return _Kept(server, client, time.monotonic(), num_losses)

    def _announce(self) -> None:
        self.step.announce(self._node, [kept.server for kept in self._servers])

    def _name(self, kept: _Kept) -> str:
        return f"vLLM server {kept.server.place} on {node_name()}, start {kept.server.start},"
