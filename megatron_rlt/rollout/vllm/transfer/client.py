"""vLLM's client calls of a weight transfer, addressed to several servers as if they were one.

Has the methods of vLLM's `VLLMWeightSyncClient`. They never raise: the other ranks would wait in a collective for a
sender that left. The first failure is kept, and nothing is sent after it.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient


class TransferClient:
    """Drives the servers' side of a transfer over HTTP; a call returns when all servers have answered."""

    def __init__(self, servers: Sequence[ServerClient], on_failure: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            on_failure: called once, in the thread that saw the failure.

        Raises:
            EngineLostError: a server does not say how many workers it has.
        """
        self.servers = tuple(servers)
        self.on_failure = on_failure
        self.failure: Exception | None = None
        self._num_workers = [one.num_workers() for one in servers]

    @property
    def num_workers(self) -> int:
        """Workers of all servers together."""
        return sum(self._num_workers)

    def check(self) -> None:
        """Raise the first failure."""
        if self.failure is not None:
            raise self.failure

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Connect all workers: the ranks of a server's workers follow those of the servers before it."""
        bodies = []
        for number in range(len(self.servers)):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += sum(self._num_workers[:number])
            bodies.append({"init_info": info})
        self._all("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        """Tell the workers that parameters must not be used from now on."""
        self._all("/start_weight_update", [None] * len(self.servers))

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Tell the workers to receive the tensors that `update_info` describes."""
        self._all("/update_weights", [{"update_info": _as_json(update_info)}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell the workers that all weights have arrived."""
        assert weight_version is None, "the version is recorded when the caches of the old one are dropped"
        self._all("/finish_weight_update", [None] * len(self.servers))

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect the workers from an earlier trainer, if there was one."""
        self._all("/shutdown_weight_transfer_engine", [None] * len(self.servers))

    def _all(self, path: str, bodies: Sequence[Any]) -> None:
        if self.failure is not None:
            return
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for server, body in zip(self.servers, bodies, strict=True):
                pool.submit(self._ask, server, path, body)

    def _ask(self, server: ServerClient, path: str, body: Any) -> None:  # noqa: ANN401
        try:
            server.post(path, body)
        except (EngineLostError, ValueError) as error:
            if self.failure is None:
                self.failure = error
                self.on_failure()


def _as_json(update_info: Mapping[str, Any]) -> dict[str, Any]:
    """Handles of GPU memory are Python objects: vLLM's servers accept them pickled, if they were started for it."""
    info = dict(update_info)
    handles = info.pop("ipc_handles", None)
    if handles is None:
        return info
    # The pickled form of the same field, which the sender leaves None.
    return info | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}
