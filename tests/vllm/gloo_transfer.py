"""A double of the NCCL communicator in vLLM's weight transfer, so that `transport: broadcast` runs on a CPU.

Gloo broadcasts in NCCL's place. All else is real: the project's transport, and vLLM's two engines, their packing and
their calls over HTTP.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(seconds=60)
_JOINED = "joined"  # in the store: number of workers that have joined
_POLL_SECONDS = 0.01


class GlooCommunicator:
    """The methods of vLLM's `PyNcclCommunicator` that its weight transfer calls."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._group: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(store, rank, size, _TIMEOUT)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        if self._group is None:
            raise RuntimeError("the communicator was destroyed")
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Whoever waits for a broadcast fails."""
        self._group = None


def replace_nccl() -> None:
    """From now on weight transfers of this process, trainer or worker of a server, go through gloo."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    trainer_init = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init

    def checked_trainer_init(cls: Any, init_info: Any, *, client: Any, source: Any) -> Any:
        nccl_engine.open_trainer_endpoint = lambda info: _open(info, client.check)
        return trainer_init(init_info, client=client, source=source)

    nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init = classmethod(checked_trainer_init)
    nccl_engine.worker_init_process_group = _join
    packed_tensor._get_streams = lambda _, num_buffers: (SimpleNamespace(synchronize=lambda: None),) * num_buffers
    torch.accelerator.current_device_index = lambda: 0


def _open(init_info: Any, check: Callable[[], None]) -> GlooCommunicator:
    """The sender's end. `check` raises if a server refuses: NCCL would wait for its workers without end."""
    size = init_info.world_size
    address = (init_info.master_address, init_info.master_port)
    listener = socket.create_server(address)  # as vLLM does: on this address alone
    store = dist.TCPStore(
        *address, size, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=False
    )
    try:
        while store.add(_JOINED, 0) < size - 1:
            check()
            time.sleep(_POLL_SECONDS)
        return GlooCommunicator(store, 0, size)
    finally:
        del store  # workers that wait there for one that does not come give up


def _join(init_info: Any, parallel_config: Any) -> GlooCommunicator:
    """A worker's end; ranks are counted as vLLM counts them."""
    size = init_info.world_size
    rank = init_info.rank_offset + parallel_config.data_parallel_index * parallel_config.world_size
    store = dist.TCPStore(init_info.master_address, init_info.master_port, size, False, _TIMEOUT)
    store.add(_JOINED, 1)
    return GlooCommunicator(store, rank + parallel_config.rank, size)
