"""Sums, means and largest values over ranks, when each rank saw a different part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Tally:
    """What is known of a set of numbers; two tallies add up to that of both sets. NaN and infinity stay visible."""

    total: float
    count: int
    maximum: float  # -inf of no numbers

    @classmethod
    def of(cls, values: Iterable[float]) -> Tally:
        numbers = [float(value) for value in values]
        broken = any(math.isnan(number) for number in numbers)
        largest = max(numbers, default=-math.inf)
        return cls(math.fsum(numbers) if not broken else math.nan, len(numbers), math.nan if broken else largest)

    @property
    def mean(self) -> float:
        """NaN of no numbers."""
        return self.total / self.count if self.count else math.nan

    def __add__(self, other: Tally) -> Tally:
        maxima = (self.maximum, other.maximum)
        maximum = math.nan if any(math.isnan(value) for value in maxima) else max(maxima)
        return Tally(self.total + other.total, self.count + other.count, maximum)


def reduce_tallies(mine: Mapping[str, Tally], group: dist.ProcessGroup) -> dict[str, Tally]:
    """Add up tallies by name over a group, in the order of its ranks so that every rank gets the same bits.

    A name that some ranks do not have is the sum of the others'. Collective on the group.
    """
    parts: list[Mapping[str, Tally]] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(parts, dict(mine), group=group)
    names = sorted({name for part in parts for name in part})
    return {name: sum((part[name] for part in parts if name in part), Tally.of(())) for name in names}


def largest(mine: Mapping[str, float], group: dist.ProcessGroup) -> dict[str, float]:
    """The largest value of every name over a group: seconds and bytes are those of the slowest or fullest rank."""
    tallies = reduce_tallies({name: Tally.of((value,)) for name, value in mine.items()}, group)
    return {name: tally.maximum for name, tally in tallies.items()}
