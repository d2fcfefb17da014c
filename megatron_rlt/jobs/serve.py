"""`megatron-rlt serve`: the vLLM servers of one node, for a job whose script gives its last nodes to servers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.commands.rl import RlConfig
from megatron_rlt.config.models import Shapes
from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.jobs.rl.vllm import engine_shape
from megatron_rlt.parallel.environment import given_place, node_name, server_step, visible_devices
from megatron_rlt.rollout.vllm.require_key import WORD as REQUIRE_KEY
from megatron_rlt.rollout.vllm.server_keeper import keep_servers
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import command


def run_serve(config: JobConfig, shapes: Shapes, *, dry_run: bool) -> int:
    """Serve until a SIGTERM, or print the servers' command lines. Returns the exit status; ValueError on bad input."""
    shape = _engine_shape(config, shapes)
    devices = _devices_of_servers(shape.tp)
    if dry_run:
        words = command(shape, {"host": "HOST", "port": "PORT", "middleware": REQUIRE_KEY})
        for one in devices:
            print(shlex.join([*([f"CUDA_VISIBLE_DEVICES={one}"] if one else []), *words]))
        return 0
    step = server_step()
    if step is None:
        raise ValueError(
            "serve: is a step of a job with SERVER_NODES, which slurm/lib.sh starts; --dry-run prints what it would run"
        )
    place = given_place()  # None: the step has one task
    return keep_servers(shape, devices, step.folder, 0 if place is None else place.rank)


def _engine_shape(config: JobConfig, shapes: Shapes) -> EngineShape:
    """What the trainer's engine expects. Raises ValueError if it expects no servers that this command starts."""
    if not isinstance(config, RlConfig | CollectConfig):
        raise ValueError("serve: the command samples nothing with vLLM; leave SERVER_NODES out")
    rollout, server = config.rollout, config.rollout.vllm.server
    if rollout.engine != "vllm" or rollout.vllm.placement != "server":
        raise ValueError(
            "SERVER_NODES: the configuration has no vLLM servers; set rollout.engine=vllm and"
            " rollout.vllm.placement=server, or leave SERVER_NODES out"
        )
    if server.addresses or server.devices != VllmServerConfig().devices:
        raise ValueError(
            "SERVER_NODES: the job's own step serves, with all GPUs of its nodes; leave rollout.vllm.server.addresses"
            " and rollout.vllm.server.devices out, or SERVER_NODES"
        )
    if server.transport == "ipc":
        raise ValueError(
            "rollout.vllm.server.transport=ipc: needs servers on the trainer's own GPUs, and those of SERVER_NODES are"
            " on other nodes; set transport=broadcast or files"
        )
    policy, name = (config.policy, config.policy_name) if isinstance(config, RlConfig) else (config.teacher, "teacher")
    return engine_shape(config, policy, shapes[name])


def _devices_of_servers(tp: int) -> Sequence[str]:
    """CUDA_VISIBLE_DEVICES of each server of this node; without GPUs one server."""
    count = torch.cuda.device_count()
    if count == 0:
        return [""]
    names = visible_devices() or tuple(map(str, range(count)))
    if tp > len(names):
        raise ValueError(
            f"rollout.vllm.tp={tp}: {node_name()} has {len(names)} GPUs, and a server lies on one node; lower"
            " rollout.vllm.tp"
        )
    return [",".join(names[first : first + tp]) for first in range(0, len(names) - tp + 1, tp)]
