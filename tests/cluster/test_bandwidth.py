"""Which node is slow, and what ranks measure."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rlt.cluster.bandwidth import all_reduce_bandwidth, neighbour_bandwidths, slow_ones
from megatron_rlt.parallel.platform import world
from tests.ranks import run_ranks


def test_a_node_below_half_of_the_median_is_slow() -> None:
    assert slow_ones({"a": 10.0, "b": 11.0, "c": 4.9, "d": 10.0}) == ["c"]
    assert slow_ones({"a": 10.0, "b": 11.0, "c": 6.0}) == []
    assert slow_ones({"a": 10.0, "b": 1.0}) == [], "of two, either may be the cause"


def _measure() -> tuple[float, dict[int, float]]:
    cpu = torch.device("cpu")
    return all_reduce_bandwidth(cpu, world()), neighbour_bandwidths(list(range(dist.get_world_size())), cpu)


def test_every_node_of_a_ring_is_measured_on_all_ranks_alike() -> None:
    results = run_ranks(_measure, 3)
    assert all(speed > 1e6 for speed, _ in results)
    assert all(found.keys() == {0, 1, 2} for _, found in results)
    assert results[0][1] == results[1][1] == results[2][1]
