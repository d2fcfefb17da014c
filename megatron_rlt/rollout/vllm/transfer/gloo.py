"""vLLM's weight transfer by broadcast where there is no GPU: its NCCL engines, with gloo in NCCL's place.

Both halves stand here. The workers of a server load this module by `--worker-extension-cls` before they make their
engine, which registers the receiving half under the name `gloo`; the trainer's first rank makes the sending half.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from megatron_rlt.rollout.vllm.transfer.client import TransferClient
from megatron_rlt.rollout.vllm.transfer.tensor_source import TensorMeta, TensorSource, cut_into_buckets
from megatron_rlt.rollout.vllm.transfer.worker import ShownWeights

BACKEND = "gloo"


_JOINED = "joined"  # in the store: how many workers are there


_POLL_SECONDS = 0.01


class GlooReceiver(ShownWeights):
    """What `--worker-extension-cls` names, so that this module is loaded."""


@dataclass(kw_only=True)
class GlooInitInfo(NCCLWeightTransferInitInfo):
    """What a server's workers are told before the first bucket."""

    timeout_seconds: float  # of the meeting, and of each bucket


class GlooEngine(NCCLWeightTransferEngine):
    """A worker's end."""

    init_info_cls = GlooInitInfo
    model_update_group: Any

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Meet the trainer and the other workers."""
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        timeout = timedelta(seconds=init_info.timeout_seconds)
        host, port = init_info.master_address, init_info.master_port
        store = dist.TCPStore(host, port, init_info.world_size, False, timeout)  # type: ignore[attr-defined]
        # As vLLM's NCCL engine counts them.
        place = self.parallel_config
        rank = init_info.rank_offset + place.data_parallel_index * place.world_size + place.rank
        store.add(_JOINED, 1)
        self.model_update_group = _group(store, rank, init_info.world_size, timeout)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Take bucket after bucket into the model."""
        if self.model_update_group is None:
            raise RuntimeError("no trainer has met this worker: /init_weight_transfer_engine comes first")
        described = [
            TensorMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        try:
            for bucket in cut_into_buckets(described, lambda one: one.num_bytes, self.packed_buffer_size_bytes):
                # A buffer of its own for each: vLLM keeps views of it until a layer is complete.
                packed = torch.empty(sum(one.num_bytes for one in bucket), dtype=torch.uint8)
                self.model_update_group.broadcast([packed], dist.BroadcastOptions()).wait()
                self.model.load_weights(_unpacked(packed, bucket))
        except BaseException:
            self.shutdown()  # the sender would wait for this worker until its time is up
            raise

    def shutdown(self) -> None:
        """Hang up."""
        self.model_update_group = None


@dataclass(kw_only=True)
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """What the trainer's end is told."""

    backend: ClassVar[str] = BACKEND
    timeout_seconds: float


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """The end of the trainer's first rank; it alone has one."""

    init_info_cls = GlooTrainerInitInfo
    model_update_group: Any

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInitInfo, *, client: TransferClient, source: TensorSource) -> Self:
        """Meet all workers of all servers.

        Raises:
            Exception: the client's, if a server refuses or is gone.
        """
        engine = cls(client=client, source=source, packed_buffer_size_bytes=init_info.packed_buffer_size_bytes)
        size, seconds = init_info.world_size, init_info.timeout_seconds
        store = _open_store(init_info.master_address, size, seconds)
        workers = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=store.port,
            rank_offset=1,
            world_size=size,
            packed=True,
            packed_buffer_size_bytes=init_info.packed_buffer_size_bytes,
            timeout_seconds=seconds,
        )
        pool = ThreadPoolExecutor(1)
        try:
            told = pool.submit(client.init_weight_transfer_engine, worker_init_payload(workers))
            while store.add(_JOINED, 0) < size - 1:
                client.check()  # has the servers' time-out, so this ends
                time.sleep(_POLL_SECONDS)
            engine.model_update_group = _group(store, 0, size, timedelta(seconds=seconds))
            told.result()
        finally:
            del store  # workers that wait there for one that does not come give up
            pool.shutdown(wait=False)
        client.check()
        return engine

    def _broadcast(self, source: TensorSource, meta: list[TensorMeta]) -> None:
        assert self.model_update_group is not None, "the trainer has met the workers"
        pairs: Iterator[tuple[str, Tensor]] = self._checked_iter(source, meta)
        for bucket in cut_into_buckets(pairs, lambda pair: pair[1].nbytes, self.packed_buffer_size_bytes):
            packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
            self.model_update_group.broadcast([packed], dist.BroadcastOptions()).wait()

    def shutdown(self) -> None:
        """Hang up: whoever waits for a bucket fails."""
        self.model_update_group = None


def _open_store(host: str, size: int, seconds: float) -> Any:  # noqa: ANN401
    """Where the ends find each other: the trainer's, on a free port; it does not wait for them."""
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(host, 0, size, True, timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def _group(store: Any, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:  # noqa: ANN401
    """A group beside the process's default one, whose place it leaves alone."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _unpacked(packed: Tensor, bucket: list[TensorMeta]) -> list[tuple[str, Tensor]]:
    parts = packed.split_with_sizes([one.num_bytes for one in bucket])
    return [(one.name, part.view(one.dtype).view(one.shape)) for one, part in zip(bucket, parts, strict=True)]


WeightTransferEngineFactory.register_engine(BACKEND, GlooEngine)
