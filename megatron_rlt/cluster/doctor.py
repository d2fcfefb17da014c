"""`megatron-rlt doctor`: looks at nodes, run folder and network in seconds, before models load. Collective.

A fault of a node is a line `bad node NAME: ...` and status 1: the job scripts leave that node out of the next start. A
fault of the folder is status 2, as it needs the user.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.cluster.bandwidth import all_reduce_bandwidth, neighbour_bandwidths, slow_ones
from megatron_rlt.cluster.node_facts import NodeFacts, node_facts
from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.models import Shapes
from megatron_rlt.config.plan import num_parameters
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.environment import given_place, network_settings, node_name
from megatron_rlt.parallel.platform import device, world
from megatron_rlt.types import BAD_INPUT, FAILED
from megatron_rlt.whole_files import make_folder

_CANARY_SECONDS = 30.0  # file systems may show another node's new file late
_POLL_SECONDS = 0.1
_BYTES_PER_WEIGHT = 16  # saved at most: weights, the reference's, an fp32 copy and Adam's moments


def run_doctor(shapes: Shapes, config: JobConfig, heartbeat: Heartbeat) -> int:
    """Print what was found on the first rank; returns the exit status. Collective."""
    heartbeat.beat("node")
    place = given_place()
    assert place is not None, "the launcher sets RANK and WORLD_SIZE"
    mine = node_facts(node_name(), place.local_rank, config.output_dir)
    facts = _everyone(mine)
    refusals = _refusals(facts, _checkpoint_bytes(config, shapes))
    bad = [(one.node, fault) for one in facts for fault in one.faults] + _odd_versions(facts)
    if not any(one.refusal for one in facts):
        heartbeat.beat("folder")
        bad += _blind_nodes(config.output_dir, mine.node)
    heartbeat.beat("network")
    speed = all_reduce_bandwidth(device(), world()) if len(facts) > 1 else None
    between = _between_nodes(facts)
    bad += [(node, f"reaches its neighbours with {between[node] / 1e9:.3g} GB/s only") for node in slow_ones(between)]
    if dist.get_rank() == 0:
        for line in (*_summary(facts, speed, between), *refusals, *(f"bad node {node}: {why}" for node, why in bad)):
            print(line, flush=True)
    return BAD_INPUT if refusals else FAILED if bad else 0


def _everyone(mine: NodeFacts) -> list[NodeFacts]:
    facts = [mine] * dist.get_world_size()
    dist.all_gather_object(facts, mine)
    return facts


def _checkpoint_bytes(config: JobConfig, shapes: Shapes) -> int:
    """At most what one checkpoint takes; 0 for a command that trains nothing."""
    trained = [plan.name for plan in config.plan(shapes).models if plan.optimizer_bytes > 0]
    return sum(_BYTES_PER_WEIGHT * num_parameters(shapes[name]) for name in trained)


def _refusals(facts: Sequence[NodeFacts], checkpoint_bytes: int) -> list[str]:
    refused = sorted({one.refusal for one in facts if one.refusal is not None})
    free = min(one.free_bytes for one in facts)
    if not refused and free < checkpoint_bytes:
        refused.append(
            f"output_dir: {free:,} bytes are free there, and one checkpoint takes up to {checkpoint_bytes:,}; make"
            " space or choose another folder"
        )
    return [f"folder: {line}" for line in refused]


def _odd_versions(facts: Sequence[NodeFacts]) -> list[tuple[str, str]]:
    """Nodes whose software differs from the first rank's."""
    expected, odd = facts[0].versions, []
    for node, versions in {one.node: one.versions for one in facts}.items():
        for name in sorted(expected.keys() | versions.keys()):
            if versions.get(name) != expected.get(name):
                odd.append((node, f"{name} is {versions.get(name)}, but {expected.get(name)} on {facts[0].node}"))
    return odd


def _blind_nodes(folder: Path, node: str) -> list[tuple[str, str]]:
    """Nodes that do not see a file that the first rank has just written."""
    token = broadcast_record(secrets.token_hex(8), source_rank=0, group=world())
    canary = folder / f".doctor-{token}"
    if dist.get_rank() == 0:
        make_folder(folder)
        canary.write_text(token, encoding="utf-8")
    dist.barrier()
    deadline = time.monotonic() + _CANARY_SECONDS
    while not (seen := _reads(canary, token)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    every: list[tuple[str, bool]] = [(node, seen)] * dist.get_world_size()
    dist.all_gather_object(every, (node, seen))
    if dist.get_rank() == 0:
        canary.unlink()
    blind = sorted({name for name, sees in every if not sees})
    return [
        (name, f"does not see a new file in {folder}: is it on a file system that all nodes share?") for name in blind
    ]


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _between_nodes(facts: Sequence[NodeFacts]) -> dict[str, float]:
    first_ranks = {one.node: rank for rank, one in reversed(list(enumerate(facts)))}
    if len(first_ranks) < 2:
        return {}
    speeds = neighbour_bandwidths(sorted(first_ranks.values()), device())
    return {node: speeds[rank] for node, rank in sorted(first_ranks.items())}


def _summary(facts: Sequence[NodeFacts], speed: float | None, between: dict[str, float]) -> Iterator[str]:
    nodes = dict.fromkeys(one.node for one in facts)
    yield f"nodes: {len(nodes)} ({', '.join(nodes)}), {len(facts)} ranks"
    yield "versions: " + ", ".join(f"{name} {value}" for name, value in facts[0].versions.items())
    writes = ", ".join(
        f"{one.node} {one.write_bytes_per_second / 1e9:.2g}" for one in facts if one.write_bytes_per_second is not None
    )
    yield f"run folder: {min(one.free_bytes for one in facts) / 1e9:.3g} GB free, written with GB/s: {writes or 'not'}"
    yield "network: " + (", ".join(f"{name}={value}" for name, value in network_settings().items()) or "this machine")
    if speed is not None:
        yield f"all-reduce: {speed / 1e9:.3g} GB/s per rank"
    if between:
        yield "to neighbours, GB/s: " + ", ".join(f"{node} {value / 1e9:.3g}" for node, value in between.items())
