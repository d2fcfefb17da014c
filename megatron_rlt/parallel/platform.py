"""Which device this process runs on, and its membership in the job: the one place that knows CPU from GPU."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlt.parallel.cpu import install_cpu_platform


def device() -> torch.device:
    """The device of this rank's models."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str | None:
    """The accelerator's name; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# What our libraries warn of by themselves, whatever we do: nothing a user could act on. Megatron-core 0.16.1 warns of
# optional packages and of its own defaults, and uses names of collectives that torch 2.13 is about to retire. Regular
# expressions for the beginning of the message.
_LIBRARY_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.*` is deprecated",
)


def install_platform() -> None:
    """Make Megatron-core run where there is no accelerator, and silence what it says of itself. Before its import."""
    for message in _LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message="When using .* parallelism it is recommended to set .* CUDA_DEVICE")
        install_cpu_platform()


def start_distributed(*, timeout_seconds: float, local_rank: int = 0) -> None:
    """Join the job's process group from the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Uses nccl with one GPU a rank, gloo otherwise. On GPUs gloo serves CPU tensors of the same group, so that
    records travel without touching the device.
    """
    install_platform()
    timeout = timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def world() -> dist.ProcessGroup:
    """All ranks of the job."""
    group = dist.group.WORLD
    assert group is not None, "the job's process group is not started"
    return group


def stop_distributed() -> None:
    """Leave the process group once every rank got here; leaving earlier can abort slower ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
