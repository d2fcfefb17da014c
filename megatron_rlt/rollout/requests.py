"""Requests to a sampling engine and its answers, whichever engine it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.flops import sampling_flops
from megatron_rlt.types import Completion, StoppedError


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """A request for one completion; the members of a group repeat the prompt, each with its own seed."""

    token_ids: Tensor  # [P] int64 prompt, P at least 1
    seed: int  # below 2**63; see sampling.completion_seed


@dataclass(frozen=True, eq=False)
class Arrival:
    """The completions of one part of a rollout, returned as soon as all of them are sampled."""

    part: int  # index of the part
    completions: tuple[Completion, ...]  # one per request of the part


def require_finite(logprobs: Sequence[float | None], request: SampleRequest, *, first: int = 0) -> None:
    """Raise StoppedError if a sampled token's log-prob is no finite number: its token is then no sample of anything.

    `first` is the index of the first of these tokens in its completion.
    """
    place = next((at for at, value in enumerate(logprobs) if value is None or not math.isfinite(value)), None)
    if place is None:
        return
    raise StoppedError(
        f"the model's logits are not finite: token {first + place + 1} after a prompt of {len(request.token_ids)}"
        f" tokens has the log-prob {logprobs[place]}. Its weights or activations overflow or hold NaN: check the"
        " model's folder and dtype, or the steps before if it is being trained (a lower optimizer.lr)"
    )


class StopCondition(Protocol):
    """Whether the ids sampled so far are finished; called after every token, on every rank.

    Must be a function of the ids alone: all ranks have to reach the same answer.
    """

    def __call__(self, sampled_ids: Sequence[int]) -> bool: ...


class KnownStopCondition(StopCondition, Protocol):
    """A stop condition that names what it waits for, so that another program's engine can wait for it, too."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids that end a completion."""

    @property
    def end_tag(self) -> str | None:
        """Text that ends a completion; None: only an id does."""


class SamplingEngine(ABC):
    """Continues prompts with the policy's current weights."""

    architecture: Architecture  # of the policy

    @abstractmethod
    def generate(self, requests: Sequence[SampleRequest], policy_version: int) -> list[Completion]:
        """Continue every prompt. Collective: every rank passes the same requests.

        Returns one completion per request, in order, tensors on the CPU, the same on every rank. It depends on the
        weights, its prompt and its seed, not on the requests beside it, and records the weights' `policy_version`.
        """

    @abstractmethod
    def take_peak_cache_bytes(self) -> int:
        """Peak KV-cache size on this rank in bytes since the previous call; resets the counter."""

    @abstractmethod
    def take_metrics(self) -> dict[str, float]:
        """Metrics gathered since the previous call, the same on every rank; resets them."""

    def model_flops(self, prompts: Sequence[Tensor], completions: Sequence[Completion]) -> float:
        """Model FLOP of sampling these completions, summed over all ranks; equal prompts, `[P]` each, count once."""
        return sampling_flops(self.architecture, prompts, [len(completion.token_ids) for completion in completions])
