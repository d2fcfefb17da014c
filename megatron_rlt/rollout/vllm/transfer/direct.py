"""Weight transport without files, by vLLM's own weight transfer: an NCCL broadcast, or GPU memory that both sides map.

The first rank drives the servers. Both ways need GPUs.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.parallel.collectives import on_first_rank
from megatron_rlt.parallel.environment import free_port, nccl_stays_on_this_machine
from megatron_rlt.parallel.platform import device, world
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.servers import WeightTransport
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.transfer.client import TransferClient
from megatron_rlt.rollout.vllm.transfer.files import DOING, FileTransport
from megatron_rlt.rollout.vllm.transfer.tensor_source import TensorSource
from megatron_rlt.types import OnProgress


def weight_transport(shape: EngineShape, folder: Path, on_progress: OnProgress) -> WeightTransport:
    """The configured transport. `folder`: of the run; weights pass through it unless `transfer_dir` is set."""
    server = shape.settings.server
    if server.transport == "files":
        through = folder if server.transfer_dir is None else server.transfer_dir
        return FileTransport(shape.folder, through / "weight_sync", on_progress)
    transport = IpcTransport if server.transport == "ipc" else BroadcastTransport
    return transport(server.bucket_bytes, on_progress)


class DirectTransport(WeightTransport):
    """What broadcast and shared memory have in common: connecting, finishing, and recovering from a failure."""

    needs: str
    """Command-line options without which a server refuses the transfer."""

    def __init__(self, bucket_bytes: int, on_progress: OnProgress) -> None:
        """`bucket_bytes`: tensors are sent together in buckets of this size."""
        self._bucket_bytes, self._on_progress = bucket_bytes, on_progress
        self._source = TensorSource(self._check, lambda: on_progress(DOING))
        self._device = device()
        self._client: TransferClient | None = None  # on the first rank, once it is connected
        self._engine: Any = None  # vLLM's, on the first rank

    def send(self, tensors: Iterable[tuple[str, Tensor]], servers: Sequence[ServerClient], version: int) -> None:
        """As `WeightTransport.send`."""
        self._source.set_source(tensors)
        on_first_rank(lambda: self._begin(servers), world(), self._on_progress, DOING)
        failure = self._transfer()
        on_first_rank(lambda: self._end(servers, version, failure), world(), self._on_progress, DOING)

    @abstractmethod
    def _connect(self, client: TransferClient) -> None:
        """Open the first rank's end; called in a thread."""

    @abstractmethod
    def _transfer(self) -> Exception | None:
        """Send all tensors, and exhaust them in any case. Collective. Returns the failure, on the first rank."""

    @abstractmethod
    def _check(self) -> None:
        """Called before each tensor is sent; raises to end the transfer early."""

    def _begin(self, servers: Sequence[ServerClient]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread starts with the first GPU
        logging.getLogger("vllm").setLevel(logging.ERROR)
        try:
            for one in servers:
                one.pause()
            # A server that restarted knows nothing of the group it was in.
            if self._client is None or self._client.servers != tuple(servers):
                self._disconnect()
                client = TransferClient(servers)
                client.shutdown_weight_transfer_engine()  # of an earlier job
                client.check()
                self._connect(client)
                self._client = client
        except RuntimeError as error:  # an EngineLostError, or what NCCL raises
            self._give_up(servers)
            raise self._refusal(servers, error) from error

    def _end(self, servers: Sequence[ServerClient], version: int, failure: Exception | None) -> None:
        if failure is not None:
            self._give_up(servers)
            raise failure
        for one in servers:
            one.is_lost = True
            one.resume(version)
            one.is_lost = False

    def _give_up(self, servers: Sequence[ServerClient]) -> None:
        self._disconnect()  # first: servers that wait for a bucket return from it
        for one in servers:
            one.is_lost = one.is_lost or not one.leave_transfer()

    def _disconnect(self) -> None:
        engine, self._engine, self._client = self._engine, None, None
        if engine is not None:
            engine.shutdown()

    def _refusal(self, servers: Sequence[ServerClient], error: Exception) -> Exception:
        """The error to raise if servers do not begin a transfer."""
        if all(one.process is None and one.answers() for one in servers):
            return ValueError(
                f"rollout.vllm.server.addresses: a server does not begin a weight transfer ({error}); for this"
                f" transport it must run with {self.needs}, and reach this machine; or use transport=files"
            )
        return EngineLostError(f"vLLM's servers do not begin a weight transfer: {error}")


class BroadcastTransport(DirectTransport):
    """From the first rank to all workers of all servers at once, by NCCL."""

    needs = """--weight-transfer-config '{"backend":"nccl"}'"""

    def _connect(self, client: TransferClient) -> None:
        from vllm.distributed.weight_transfer import nccl_engine

        host = client.servers[0].local_host()  # vLLM's store of the transfer listens on this address alone
        if nccl_stays_on_this_machine() and not ip_address(host).is_loopback:
            raise ValueError(
                f"rollout.vllm.server.transport=broadcast: the servers are reached from {host}, but NCCL uses this"
                " machine's loopback interface only; set NCCL_SOCKET_IFNAME to the interface that reaches them"
            )
        info = nccl_engine.NCCLTrainerInitInfo(
            host,
            free_port(host),
            1 + client.num_workers,
            packed_buffer_size_bytes=self._bucket_bytes,
            rank=0,
        )
        self._engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=client, source=self._source
        )
        client.check()
        # NCCL does not notice that a worker is gone: only an abort makes the sender return.
        client.on_failure = self._engine.shutdown

    def _transfer(self) -> Exception | None:
        self._source.metadata()
        failure = self._send_all() if dist.get_rank() == 0 else None
        self._source.exhaust()
        return failure

    def _send_all(self) -> Exception | None:
        assert self._client is not None, "the servers are connected"
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
    """Through memory of the GPUs that trainer and servers share: every rank fills a bucket, which its worker maps."""

    needs = """--weight-transfer-config '{"backend":"ipc"}' and VLLM_ALLOW_INSECURE_SERIALIZATION=1"""

    def _connect(self, client: TransferClient) -> None:
        """Nothing to open: the handles travel with each bucket."""

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
        """Nothing ends it early: the ranks meet for each bucket, and the client never raises."""
