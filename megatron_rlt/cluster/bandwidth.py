"""How fast ranks exchange tensors: all of them, and each node with its neighbours, so that a slow node has a name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
import torch.distributed as dist

_BYTES_ON_GPU, _BYTES_ON_CPU = 256 << 20, 4 << 20
_NUM_ROUNDS = 3  # the first opens the connections and is not counted
_SLOW_SHARE = 0.5  # of the median


def all_reduce_bandwidth(device: torch.device, group: dist.ProcessGroup) -> float:
    """Bytes per second of an all-reduce: 2 (n-1)/n of the tensor pass through every rank. Collective on the group."""
    size = _BYTES_ON_GPU if device.type == "cuda" else _BYTES_ON_CPU
    tensor = torch.zeros(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for number in range(_NUM_ROUNDS):
        started = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 0:
            best = min(best, time.monotonic() - started)
    return 2 * (group.size() - 1) / group.size() * size / max(best, 1e-9)


def neighbour_bandwidths(first_ranks: Sequence[int], device: torch.device) -> dict[int, float]:
    """Bytes per second between neighbouring nodes in a ring, best of its two by a node's first rank. Collective.

    Pairs with an even number run at once, then those with an odd one: no node is in two at a time.
    """
    found: dict[int, float] = {}
    count = len(first_ranks)
    pairs = [(first_ranks[place], first_ranks[(place + 1) % count]) for place in range(count if count > 2 else 1)]
    groups = [dist.new_group(list(pair)) for pair in pairs]
    for parity in (0, 1):
        for pair, group in list(zip(pairs, groups, strict=True))[parity::2]:
            if dist.get_rank() in pair:
                speed = all_reduce_bandwidth(device, group)
                found[dist.get_rank()] = max(found.get(dist.get_rank(), 0.0), speed)
        dist.barrier()
    every: list[dict[int, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return {rank: speed for part in every for rank, speed in part.items()}


def slow_ones(speeds: Mapping[str, float]) -> list[str]:
    """Of three nodes or more, those that reach less than half of the median."""
    if len(speeds) < 3:
        return []
    return [node for node, speed in speeds.items() if speed < _SLOW_SHARE * median(speeds.values())]
