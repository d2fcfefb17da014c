"""Reads and sets every environment variable that this project uses."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.parallel.network import active_infiniband_ports, address_towards, interface_towards

# Below Linux's ephemeral ports (32768 and up), in a range wide enough that two jobs of a cluster seldom collide.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
_LAUNCH = "start with torchrun or srun, or unset the launcher's variables and let world_size start the ranks"
_LOOPBACK = "lo"  # Linux's name of the interface that no other machine reaches


@dataclass(frozen=True)
class Place:
    """This process's rank in a job."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str  # the program that started the ranks, for messages
    meeting_file: Path | None = None
    """Through which ranks that this command started find each other; None: there are no others, or MASTER_ADDR says."""

    @property
    def is_on_one_machine(self) -> bool:
        """Whether all ranks are known to run on this machine."""
        return self.world_size == 1 or self.meeting_file is not None


def given_place() -> Place | None:
    """This process's ranks if torchrun or srun started it, else None.

    An srun step of one task is no launcher: it may still start `world_size` ranks on its node.
    """
    given = os.environ
    if "RANK" in given and "WORLD_SIZE" in given:
        rank, world_size = _whole_number("RANK"), _whole_number("WORLD_SIZE", least=1)
        local_rank = _whole_number("LOCAL_RANK") if "LOCAL_RANK" in given else rank
        return _checked_place(Place(rank, world_size, local_rank, "torchrun"), "RANK", "WORLD_SIZE")
    # A batch script outside srun has SLURM_PROCID too, but no step id.
    if "SLURM_STEP_ID" not in given or "SLURM_PROCID" not in given:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if given.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    num_tasks = _whole_number(tasks, least=1)
    if num_tasks == 1:
        return None
    place = Place(_whole_number("SLURM_PROCID"), num_tasks, _whole_number("SLURM_LOCALID"), "srun")
    return _checked_place(place, "SLURM_PROCID", tasks)


def _whole_number(name: str, *, least: int = 0, most: int | None = None) -> int:
    """A launcher's variable; raises ValueError that names it where it is absent or no such number."""
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"environment variable {name} is not set; {_LAUNCH}")
    value = int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else -1
    if value < least or (most is not None and value > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ValueError(f"environment variable {name}={text!r}: must be a whole number {bounds}; {_LAUNCH}")
    return value


def _checked_place(place: Place, rank: str, world_size: str) -> Place:
    if place.rank >= place.world_size:
        raise ValueError(
            f"environment variable {rank}={place.rank}: must be below {world_size}={place.world_size}; {_LAUNCH}"
        )
    return place


@contextmanager
def torch_environment(place: Place) -> Iterator[None]:
    """Set the variables with which `torch.distributed` finds its peers; restored afterwards.

    Ranks on one machine talk over its loopback interface only.
    """
    values = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank)}
    if place.is_on_one_machine:
        values |= {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _nccl_interface()}
    else:
        address, port = _rendezvous_endpoint(place)
        values |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        if place.launcher == "srun":
            values |= _cluster_network(address, port)
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
    """Split this machine's cores evenly over its ranks unless OMP_NUM_THREADS is set; ranks inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))


def set_block_scales(*, float32: bool) -> None:
    """Choose the scales of Transformer Engine's blockwise FP8 in this process: float32, or powers of two.

    Call before Megatron is imported, which imports Transformer Engine, which reads the variable then.
    """
    os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1" if float32 else "0"


def prepare_vllm(rank: int, world_size: int, *, on_cpu: bool) -> None:
    """Set the variables that vLLM reads when a rank imports and starts it; the user's own values stay.

    The engine runs in this process, and reads its ranks from torchrun's variables.
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


def server_environment(
    devices: str, folder: Path, *, on_cpu: bool, unpickles: bool, api_key: str | None
) -> dict[str, str]:
    """The environment of a vLLM server that this process starts: its own without rank variables.

    Args:
        devices: its CUDA_VISIBLE_DEVICES; empty: this process's.
        folder: for its temporary files, such as the sockets between its processes.
        unpickles: whether it accepts pickled objects.
        api_key: of a server of other nodes, which the trainer's first rank reaches over the network; None: it serves
            this machine.
    """
    left_out = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    left_out.add("VLLM_API_KEY")  # of other servers: this one's socket is open to its user alone
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    # The former enables the weight-update routes.
    wanted = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "NCCL_SOCKET_IFNAME": _LOOPBACK}
    if on_cpu:
        # Idle threads of several processes would compete for cores, and log-probs would need a C++ compiler.
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    given = {"TMPDIR": str(folder), "GLOO_SOCKET_IFNAME": _LOOPBACK, "VLLM_HOST_IP": "127.0.0.1"}
    if devices:
        given["CUDA_VISIBLE_DEVICES"] = devices
    if unpickles:
        given["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if api_key is not None:  # weights may be broadcast to it by NCCL
        left_out.remove("VLLM_API_KEY")
        given["VLLM_API_KEY"] = api_key
        wanted |= _cluster_network(*_first_node())
    return {name: value for name, value in (wanted | kept | given).items() if name not in left_out}


def vllm_api_key() -> str:
    """The key that vLLM's server demands; empty without one."""
    return os.environ.get("VLLM_API_KEY", "")


@dataclass(frozen=True)
class ServerStep:
    """The step of vLLM servers that a script of `slurm/` started beside the ranks' own."""

    folder: Path  # where its nodes say what they serve
    num_nodes: int


def server_step() -> ServerStep | None:
    """The servers' step of this job; None: it has none."""
    attempt, num_nodes = attempt_folder(), os.environ.get("RLT_SERVER_NODES", "0")
    return None if attempt is None or num_nodes == "0" else ServerStep(attempt / "servers", int(num_nodes))


def address_for_ranks() -> str:
    """This node's address at which the first rank's node can reach it."""
    address, port = _first_node()
    found = address_towards(address, port)
    if found is None:
        raise ValueError(f"this node, {node_name()}, knows no way to the first one, {address}; set MASTER_ADDR")
    return found


def visible_devices() -> tuple[str, ...]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them; empty where it does not say."""
    return tuple(one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one)


def _first_node() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _master_port() if "MASTER_PORT" in os.environ else _FIRST_PORT


def _cluster_network(address: str, port: int) -> dict[str, str]:
    """Interfaces and InfiniBand ports of this node towards the first one; the user's own values stay."""
    found = {"NCCL_IB_HCA": "=" + ",".join(active_infiniband_ports()) if active_infiniband_ports() else None}
    interface = interface_towards(address, port)
    found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {name: value for name, value in found.items() if value is not None and name not in os.environ}


def network_settings() -> dict[str, str]:
    """What this process tells NCCL and gloo of the network, by variable."""
    names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
    return {name: os.environ[name] for name in (*names, "CUDA_DEVICE_MAX_CONNECTIONS") if name in os.environ}


def attempt_folder() -> Path | None:
    """The folder of this attempt at a job, where a script of `slurm/` started this rank."""
    given = os.environ.get("RLT_ATTEMPT_DIR")
    return Path(given) if given else None


def node_name() -> str:
    """Slurm's name of this node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_step() -> str:
    """Slurm's name of the step that this rank belongs to, such as `1234.0`."""
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"


def job_end() -> float | None:
    """When Slurm ends this job, in seconds since the epoch; None: not known."""
    given = os.environ.get("SLURM_JOB_END_TIME")
    return float(_whole_number("SLURM_JOB_END_TIME")) if given else None


def started_by_elastic() -> bool:
    """Whether a torch elastic agent started this process and reads its error file."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def wandb_mode() -> str:
    """The user's W&B mode; offline unless set."""
    return os.environ.get("WANDB_MODE", "offline")


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list, such as `gpu[07-09,12],cpu1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_NODELIST={node_list!r} names no host; set MASTER_ADDR to the first node's name")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _rendezvous_endpoint(place: Place) -> tuple[str, int]:
    given = os.environ
    if "MASTER_ADDR" in given and "MASTER_PORT" in given:
        return given["MASTER_ADDR"], _master_port()
    if place.launcher != "srun":
        raise ValueError(
            f"{place.launcher} set RANK and WORLD_SIZE but not MASTER_ADDR and MASTER_PORT;"
            " set them to the first rank's host and a free port"
        )
    if "MASTER_PORT" in given:
        port = _master_port()
    else:
        port = _FIRST_PORT + (7 * _whole_number("SLURM_JOB_ID") + _whole_number("SLURM_STEP_ID")) % _NUM_PORTS
    return given["MASTER_ADDR"] if "MASTER_ADDR" in given else first_host(_node_list()), port


def _master_port() -> int:
    return _whole_number("MASTER_PORT", least=1, most=65535)


def _node_list() -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    found = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if found is None:
        raise ValueError(f"environment variable {names[0]} is not set; set MASTER_ADDR to the first node's name")
    return found


def nccl_stays_on_this_machine() -> bool:
    """Whether NCCL, in this process, cannot reach others."""
    return os.environ.get("NCCL_SOCKET_IFNAME") == _LOOPBACK


def _nccl_interface() -> str:
    """The user's, who may broadcast weights to servers of other machines, else loopback."""
    return os.environ.get("NCCL_SOCKET_IFNAME", _LOOPBACK)


def free_port(host: str = "127.0.0.1") -> int:
    """A free TCP port of one of this machine's addresses."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
