"""Sums, means and maxima over ranks that each saw a different part of the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Tally:
    """Sum, count and maximum of a set of numbers; tallies of disjoint sets add up. Propagates NaN and infinity."""

    total: float
    count: int
    maximum: float  # -inf if empty

    @classmethod
    def of(cls, values: Iterable[float]) -> Tally:
        numbers = [float(value) for value in values]
        broken = any(math.isnan(number) for number in numbers)
        largest = max(numbers, default=-math.inf)
        return cls(math.fsum(numbers) if not broken else math.nan, len(numbers), math.nan if broken else largest)

    @property
    def mean(self) -> float:
        """NaN if empty."""
        return self.total / self.count if self.count else math.nan

    def __add__(self, other: Tally) -> Tally:
        maxima = (self.maximum, other.maximum)
        maximum = math.nan if any(math.isnan(value) for value in maxima) else max(maxima)
        return Tally(self.total + other.total, self.count + other.count, maximum)


def reduce_tallies(mine: Mapping[str, Tally], group: dist.ProcessGroup) -> dict[str, Tally]:
    """Add up tallies by name over a group, in rank order so that every rank gets the same bits. Collective.

    Ranks that lack a name contribute nothing to it.
    """
    parts: list[Mapping[str, Tally]] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(parts, dict(mine), group=group)
    names = sorted({name for part in parts for name in part})
    return {name: sum((part[name] for part in parts if name in part), Tally.of(())) for name in names}


def largest(mine: Mapping[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """Maximum of every name over a group, such as the seconds of the slowest rank. Collective."""
    tallies = reduce_tallies({name: Tally.of((value,)) for name, value in mine.items()}, group)
    return {name: tally.maximum for name, tally in tallies.items()}
