"""Weights to vLLM servers without files, by vLLM's own weight transfer: a broadcast, or memory that both sides map.

The first rank drives the servers. On GPUs both ways are vLLM's engines; on a CPU gloo broadcasts in NCCL's place
(`gloo_transfer.py`), with the same source, client and order of calls.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.environment import free_port
from megatron_rlt.parallel.platform import device, world
from megatron_rlt.rollout.vllm.client import EngineLostError, VllmServer
from megatron_rlt.rollout.vllm.settings import GLOO_RECEIVER
from megatron_rlt.rollout.vllm.transfer.client import TransferClient
from megatron_rlt.rollout.vllm.transfer.files import DOING
from megatron_rlt.rollout.vllm.transfer.tensor_source import TensorSource
from megatron_rlt.types import OnProgress

_NEEDS = {
    "gloo": f"""--weight-transfer-config '{{"backend":"gloo"}}' --worker-extension-cls {GLOO_RECEIVER}""",
    "nccl": """--weight-transfer-config '{"backend":"nccl"}'""",
    "ipc": """--weight-transfer-config '{"backend":"ipc"}' and VLLM_ALLOW_INSECURE_SERIALIZATION=1""",
}


class DirectTransport(ABC):
    """What a broadcast and shared memory have in common: the meeting, the end, and what follows a failure."""

    def __init__(self, backend: str, bucket_bytes: int, timeout_seconds: float, on_progress: OnProgress) -> None:
        """
        Args:
            backend: by vLLM's name.
            timeout_seconds: after which a server that does not take a bucket counts as lost.
        """
        self._backend, self._bucket_bytes, self._timeout_seconds = backend, bucket_bytes, timeout_seconds
        self._on_progress = on_progress
        self._source = TensorSource(self._check, lambda: on_progress(DOING))
        self._device = device()
        self._client: TransferClient | None = None  # on the first rank, once it has met the servers
        self._engine: Any = None  # vLLM's, there

    def send(
        self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[VllmServer], lost: set[int], version: int
    ) -> None:
        """As `WeightTransport.send`."""
        self._source.follow(tensors)
        on_first_rank(lambda: self._meet(servers, lost), world(), self._on_progress, DOING)
        failure = self._transfer()
        on_first_rank(lambda: self._end(servers, lost, version, failure), world(), self._on_progress, DOING)

    @abstractmethod
    def _connect(self, client: TransferClient) -> None:
        """Open the first rank's end, in a thread."""

    @abstractmethod
    def _transfer(self) -> Exception | None:
        """Send all tensors, and exhaust them in any case. Collective. Returns what broke, on the first rank."""

    @abstractmethod
    def _check(self) -> None:
        """Before each tensor that goes out: raise what ends the transfer early."""

    def _meet(self, servers: Sequence[VllmServer], lost: set[int]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins with the first
        logging.getLogger("vllm").setLevel(logging.ERROR)
        try:
            for one in servers:
                one.pause()
            # A server that started again knows nothing of the group it was in.
            if self._client is None or self._client.servers != tuple(servers):
                self._leave()
                client = TransferClient(servers)
                client.shutdown_weight_transfer_engine()  # of a job before this one
                client.check()
                self._connect(client)
                self._client = client
        except RuntimeError as error:  # EngineLostError is one, and so is whatever gloo and NCCL raise
            self._give_up(servers, lost)
            raise self._refusal(servers, error) from error

    def _end(self, servers: Sequence[VllmServer], lost: set[int], version: int, failure: Exception | None) -> None:
        if failure is not None:
            self._give_up(servers, lost)
            raise failure
        for number, one in enumerate(servers):
            lost.add(number)
            one.resume(version)
            lost.remove(number)

    def _give_up(self, servers: Sequence[VllmServer], lost: set[int]) -> None:
        """Hang up first: servers that wait for a bucket come back from it."""
        self._leave()
        lost.update(number for number, one in enumerate(servers) if not one.leave_transfer())

    def _leave(self) -> None:
        engine, self._engine, self._client = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    def _refusal(self, servers: Sequence[VllmServer], error: Exception) -> Exception:
        """What it means that servers do not begin a transfer."""
        if all(one.process is None and one.answers() for one in servers):
            return ValueError(
                f"rollout.vllm.server.addresses: a server does not begin a weight transfer ({error}); for this"
                f" transport it must run with {_NEEDS[self._backend]}, and reach this machine; or use transport=files"
            )
        return EngineLostError(f"vLLM's servers do not begin a weight transfer: {error}")


class BroadcastTransport(DirectTransport):
    """From the first rank to all workers of all servers at once: NCCL on GPUs, gloo on a CPU."""

    def _connect(self, client: TransferClient) -> None:
        host, size = client.servers[0].local_host(), 1 + client.num_workers
        if self._backend == "gloo":
            self._engine = self._meet_by_gloo(client, host, size)
            return
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        info = NCCLTrainerInitInfo(host, free_port(), size, packed_buffer_size_bytes=self._bucket_bytes, rank=0)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=self._source)
        client.check()
        # NCCL does not notice that a worker is gone: only an abort brings the sender back.
        client.on_failure = self._engine.shutdown

    def _meet_by_gloo(self, client: TransferClient, host: str, size: int) -> Any:  # noqa: ANN401
        from megatron_rlt.rollout.vllm.transfer.gloo import GlooTrainerEngine, GlooTrainerInitInfo

        info = GlooTrainerInitInfo(
            master_address=host,
            master_port=0,  # a free one
            world_size=size,
            packed_buffer_size_bytes=self._bucket_bytes,
            rank=0,
            timeout_seconds=self._timeout_seconds,
        )
        return GlooTrainerEngine.trainer_init(info, client=client, source=self._source)

    def _transfer(self) -> Exception | None:
        self._source.metadata()
        failure = self._send_all() if dist.get_rank() == 0 else None
        self._source.drain()
        return failure

    def _send_all(self) -> Exception | None:
        assert self._client is not None, "the servers were met"
        try:
            self._engine.send_weights()
            self._client.check()
        except (RuntimeError, ValueError) as error:
            if self._source.is_broken:
                raise
            if isinstance(error, EngineLostError | ValueError):
                return error
            return EngineLostError(f"the broadcast to vLLM's servers broke: {error}")
        return None

    def _check(self) -> None:
        if self._client is not None:
            self._client.check()


class IpcTransport(DirectTransport):
    """Through memory of the GPUs that trainer and servers share: every rank fills a bucket that its neighbour maps."""

    def _connect(self, client: TransferClient) -> None:
        """Nothing: the handles travel with each bucket."""

    def _transfer(self) -> Exception | None:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

        # A bucket must hold the largest tensor.
        bucket_bytes = max(self._bucket_bytes, *(one.num_bytes for one in self._source.metadata()))
        info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket_bytes, rank=dist.get_rank())
        engine = IPCTrainerWeightTransferEngine.trainer_init(info, client=self._client, source=self._source)
        client = self._client
        if client is not None and client.failure is not None:
            client.failure = self._refusal(client.servers, client.failure)
        engine.send_weights()
        return None if client is None else client.failure

    def _check(self) -> None:
        """Nothing ends it early: for each bucket the ranks meet, and the client stays silent."""
