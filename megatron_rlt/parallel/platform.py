"""This process's device (CPU or GPU) and the job's process group."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, Store

from megatron_rlt.parallel.cpu import install_cpu_platform
from megatron_rlt.parallel.environment import given_place
from megatron_rlt.parallel.single_rank import start_single_rank


def device() -> torch.device:
    """The device of this rank's models."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str | None:
    """The accelerator's name; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# Library warnings on which a user cannot act (regular expressions for the start of the message): Megatron-core 0.16.1
# warns of optional packages and of its own defaults, and uses what torch 2.13 and Transformer Engine 2.11 deprecate.
# The last one is what fp8.activations=false asks for.
_LIBRARY_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.*` is deprecated",
    "fp8_autocast is deprecated",
    "fp8_model_init is deprecated",
    "You are using quantized weights without quantized compute",
)


def install_platform() -> None:
    """Make Megatron-core run without an accelerator, and silence library warnings. Call before importing Megatron."""
    for message in _LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message="When using .* parallelism it is recommended to set .* CUDA_DEVICE")
        # A CUDA build of torch without a GPU, as on a login node, warns of the toolkit that it finds.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        install_cpu_platform()


def start_distributed(*, timeout_seconds: float, local_rank: int = 0, meeting_file: Path | None = None) -> None:
    """Join the job's process group as the environment's RANK of WORLD_SIZE.

    Uses gloo on CPU ranks, and nccl with one GPU per rank otherwise, with gloo for the same group's CPU tensors.

    Args:
        meeting_file: through which the ranks of one machine meet, in a folder that nobody else may open; None: at
            MASTER_ADDR and MASTER_PORT, where the first rank's store listens. A single CPU rank needs neither.
    """
    install_platform()
    place = given_place()
    assert place is not None, "the launcher sets RANK and WORLD_SIZE"
    timeout, on_gpu = timedelta(seconds=timeout_seconds), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    elif place.world_size == 1:
        start_single_rank(timeout)
        return
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store = _private_store(meeting_file, place.world_size)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)


def _private_store(meeting_file: Path | None, world_size: int) -> Store | None:
    """A store that opens no port; None: the ranks may be on several machines."""
    if meeting_file is not None:
        return FileStore(str(meeting_file), world_size)
    return HashStore() if world_size == 1 else None


_OUTSIDE_A_JOB = timedelta(minutes=30)  # collectives of one rank never wait


@contextmanager
def process_group_of_one() -> Iterator[None]:
    """A process group of this process alone, for a model outside a job; one of a single rank that exists is kept."""
    install_platform()
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "models outside a job run in one process"
        yield
        return
    if torch.cuda.is_available():
        dist.init_process_group("cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1)
    else:
        start_single_rank(_OUTSIDE_A_JOB)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    """All ranks of the job."""
    group = dist.group.WORLD
    assert group is not None, "the job's process group is not started"
    return group


def group_of_a_thread(*, timeout_seconds: float) -> dist.ProcessGroup:
    """All ranks once more, for CPU tensors of one thread whose collectives run beside the job's. Collective."""
    backend = "gloo" if torch.cuda.is_available() else None  # None: the job's own
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def free_device_bytes() -> int | None:
    """Memory of this rank's GPU that can still be allocated; None on a CPU, whose ranks share the host's."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def stop_distributed() -> None:
    """Leave the process group after a barrier; leaving earlier can abort slower ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
