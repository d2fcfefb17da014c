"""Sums, means and maxima over ranks."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_rlt.metrics.reduce import Tally, largest, reduce_tallies
from tests.ranks import run_ranks


def test_a_tally_adds_up() -> None:
    both = Tally.of([1.0, 2.0]) + Tally.of([6.0])
    assert (both.total, both.count, both.maximum, both.mean) == (9.0, 3, 6.0, 3.0)


def test_nothing_has_no_mean_and_adds_nothing() -> None:
    assert math.isnan(Tally.of([]).mean)
    assert Tally.of([]) + Tally.of([-5.0]) == Tally.of([-5.0])


def test_nan_stays_visible() -> None:
    for broken in (Tally.of([1.0, math.nan]) + Tally.of([2.0]), Tally.of([2.0]) + Tally.of([math.nan])):
        assert math.isnan(broken.total)
        assert math.isnan(broken.maximum)
    assert Tally.of([math.inf, 1.0]).total == math.inf


def _reduce() -> tuple[dict[str, Tally], dict[str, float]]:
    rank = dist.get_rank()
    mine = {"reward": Tally.of([rank, rank + 10.0])} | ({"rare": Tally.of([7.0])} if rank == 1 else {})
    return reduce_tallies(mine, dist.group.WORLD), largest({"seconds": 1.0 + rank}, dist.group.WORLD)


def test_ranks_agree_on_the_sum_of_their_parts() -> None:
    """Ranks 0 and 1 saw {0, 10} and {1, 11}: sum 22, mean 5.5, max 11."""
    for tallies, slowest in run_ranks(_reduce, 2):
        assert tallies == {"rare": Tally(7.0, 1, 7.0), "reward": Tally(22.0, 4, 11.0)}
        assert tallies["reward"].mean == 5.5
        assert slowest == {"seconds": 2.0}
