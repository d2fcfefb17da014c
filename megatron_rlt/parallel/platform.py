"""This process's device (CPU or GPU) and the job's process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_rlt.parallel.cpu import install_cpu_platform


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
        install_cpu_platform()


def start_distributed(*, timeout_seconds: float, local_rank: int = 0) -> None:
    """Join the job's process group from the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Uses gloo on CPU ranks, and nccl with one GPU per rank otherwise, with gloo for the same group's CPU tensors.
    """
    install_platform()
    timeout = timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


@contextmanager
def process_group_of_one() -> Iterator[None]:
    """A process group of this process alone, for a model outside a job; one of a single rank that exists is kept."""
    install_platform()
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "models outside a job run in one process"
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    """All ranks of the job."""
    group = dist.group.WORLD
    assert group is not None, "the job's process group is not started"
    return group


def stop_distributed() -> None:
    """Leave the process group after a barrier; leaving earlier can abort slower ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
