"""What a sampling engine is asked for and gives, whichever engine it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_rlt.types import Completion


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """One completion wanted; the members of a group repeat the prompt with seeds of their own."""

    token_ids: Tensor  # [P] int64 prompt, P at least 1
    seed: int  # below 2**63; see sampling.completion_seed


@dataclass(frozen=True, eq=False)
class Arrival:
    """Completions of a part of the requests, as soon as they are there."""

    part: int  # which of the parts
    completions: tuple[Completion, ...]  # one a request


class StopCondition(Protocol):
    """Whether the ids sampled so far are a finished completion; asked after every token, on every rank.

    Must be a function of the ids alone: all ranks have to reach the same answer.
    """

    def __call__(self, sampled_ids: Sequence[int]) -> bool: ...


class KnownStopCondition(StopCondition, Protocol):
    """A stop condition that says what it waits for, so that an engine of another program can wait for it, too."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids that end a completion."""

    @property
    def end_tag(self) -> str | None:
        """Text that ends a completion; None: only an id does."""


class SamplingEngine(Protocol):
    """Continues prompts with the policy's weights as they are at the call."""

    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """Continue every prompt. Collective: every rank passes the same requests.

        Args:
            policy_version: which weights the policy has now; recorded in the completions.

        Returns:
            One completion a request, in order, tensors on the CPU, the same on every rank. For equal weights, prompt
            and seed it is the same completion again.
        """

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """What sampling these cost over all ranks, as `models.flops` counts: equal prompts count once.

        Args:
            prompts: `[P]` token ids, one prompt a completion.
        """

    def take_peak_cache_bytes(self) -> int:
        """Most that the keys and values of this rank took since the last call."""

    def take_metrics(self) -> dict[str, float]:
        """What is worth a curve since the last call, the same on every rank."""
