"""The environment variables of this project, all read and written here: what a launcher says about this process.

In: the environment that torchrun or srun made. Out: a `Place`, and the variables from which torch.distributed
finds its peers. Starting processes is left to `launch.py`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Ports from which no connection gets its own side (Linux gives out 32768 and up), in a range wide enough that two
# jobs of one cluster seldom meet.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # who started the ranks, as the user would call it


def given_place() -> Place | None:
    """This process's place if torchrun or srun started it, else None.

    An srun step of one task counts as no launcher: it may still start `world_size` ranks on its node.
    """
    given = os.environ
    if "RANK" in given and "WORLD_SIZE" in given:
        rank = int(given["RANK"])
        return Place(rank, int(given["WORLD_SIZE"]), int(given.get("LOCAL_RANK", rank)), "torchrun")
    # SLURM_PROCID alone is also set in a batch script outside srun; only a step has an id.
    if "SLURM_STEP_ID" not in given or "SLURM_PROCID" not in given:
        return None
    num_tasks = int(given.get("SLURM_STEP_NUM_TASKS") or given["SLURM_NTASKS"])
    if num_tasks == 1:
        return None
    return Place(int(given["SLURM_PROCID"]), num_tasks, int(given["SLURM_LOCALID"]), "srun")


@contextmanager
def torch_environment(place: Place) -> Iterator[None]:
    """Set what `torch.distributed` reads to find its peers, where the launcher has not; restored afterwards."""
    values = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank)}
    address, port = _meeting_point(place)
    values |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def share_cores(world_size: int) -> None:
    """Give each of this machine's ranks its part of the cores unless the user decided; ranks inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))


def prepare_vllm(rank: int, world_size: int, *, on_cpu: bool) -> None:
    """Set what vLLM reads when it is imported and started inside a rank; what the user has set stays.

    The engine must live in this very process, and finds its place among the ranks as torchrun would tell it.
    """
    place = given_place()
    local_rank = rank if place is None else place.local_rank
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_cpu:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # the ranks share the cores already
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def server_environment(devices: str, *, on_cpu: bool, unpickles: bool) -> dict[str, str]:
    """The environment of a vLLM server that a rank starts: the rank's own without its place among the ranks.

    Args:
        devices: CUDA_VISIBLE_DEVICES of the server; empty: the rank's.
        unpickles: whether it takes Python objects, as handles of GPU memory are.
    """
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")
    kept = {
        name: value for name, value in os.environ.items() if name not in ranks and not name.startswith("TORCHELASTIC_")
    }
    wanted = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}  # the former: the paths that replace weights
    if on_cpu:
        # Idle threads of several processes would spin against each other, and log-probs wait for a C++ compiler.
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    given = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
    if unpickles:
        given["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return wanted | kept | given


def started_by_elastic() -> bool:
    """Whether an elastic agent waits for this process and reads its error file."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def wandb_mode() -> str:
    """What the user told W&B; no run talks to a server unless told to."""
    return os.environ.get("WANDB_MODE", "offline")


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list, such as `gpu[07-09,12],cpu1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_NODELIST={node_list!r} names no host; set MASTER_ADDR to the first node's name")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _meeting_point(place: Place) -> tuple[str, int]:
    given = os.environ
    if "MASTER_ADDR" in given and "MASTER_PORT" in given:
        return given["MASTER_ADDR"], int(given["MASTER_PORT"])
    if place.world_size == 1:
        return "127.0.0.1", free_port()
    if place.launcher != "srun":
        raise ValueError(
            f"{place.launcher} set RANK and WORLD_SIZE but not MASTER_ADDR and MASTER_PORT;"
            " set them to the first rank's host and a free port"
        )
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or given["SLURM_NODELIST"]
    offset = (7 * int(given["SLURM_JOB_ID"]) + int(given["SLURM_STEP_ID"])) % _NUM_PORTS
    port = int(given.get("MASTER_PORT", _FIRST_PORT + offset))
    return given.get("MASTER_ADDR", first_host(nodes)), port


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
