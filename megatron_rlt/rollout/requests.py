"""What a sampling engine is asked for, whichever engine it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One completion wanted; the members of a group repeat the prompt with seeds of their own."""

    token_ids: Tensor  # [P] int64 prompt, P at least 1
    seed: int  # below 2**63; see sampling.completion_seed


class StopCondition(Protocol):
    """Whether the ids sampled so far are a finished completion; asked after every token, on every rank.

    Must be a function of the ids alone: all ranks have to reach the same answer.
    """

    def __call__(self, sampled_ids: Sequence[int]) -> bool: ...
