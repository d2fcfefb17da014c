"""Weight sync: copies the policy's weights to a sampling engine and verifies that they arrived.

Weights that the engine holds as they were sent (the norms) must have the sender's checksums. The engine's log-probs of
a probe sequence must be within a bound of the trainer's, and nearer to its current ones than to those of the version
before, which an engine that kept its weights would return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.platform import device
from megatron_rlt.rollout.weight_sync.policy_tensors import PolicyTensors
from megatron_rlt.types import StoppedError

_PROBE_TOKENS = 32
_PROBE_STRIDE = 7919  # a prime: the probe's ids are spread over the vocabulary


class Receiver(Protocol):
    """Copies of the policy in one or several sampling engines, in this process or in others."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights and drop the caches of the old ones. Every rank must exhaust the iterator."""

    def checksums_held(self, names: Sequence[str]) -> Sequence[Mapping[str, str]]:
        """For each copy that can be inspected, `checksum` of each named weight that it holds as it was sent."""

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """`[S, T - 1]` log-probs of all tokens but the first, at temperature 1, from each of S copies."""


@dataclass(frozen=True)
class SyncReport:
    """One verified weight sync."""

    seconds: float  # transfer on the slowest rank, without the checks
    num_bytes: int  # of the whole model
    probe_gap: float  # largest difference between engine and trainer in a probe token's log-prob, in nats

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "weight_sync_seconds": self.seconds,
            "weight_sync_gb_per_second": self.num_bytes / self.seconds / 1e9,
            "weight_sync_probe_gap": self.probe_gap,
        }


class WeightSync:
    """Keeps a receiver at the policy's version."""

    def __init__(
        self,
        model: LanguageModel,
        receiver: Receiver,
        *,
        trainer_logprobs: Callable[[Tensor], Tensor],
        num_token_ids: int,
        max_probe_gap: float,
    ) -> None:
        """
        Args:
            trainer_logprobs: `[T]` token ids to the trainer's own `[T - 1]` log-probs at temperature 1; collective.
            num_token_ids: the probe's ids are below it.
            max_probe_gap: in nats.
        """
        self._model, self._receiver = model, receiver
        self._trainer_logprobs, self._max_probe_gap = trainer_logprobs, max_probe_gap
        length = min(_PROBE_TOKENS, model.architecture.max_positions)
        self._probe = torch.arange(1, length + 1) * _PROBE_STRIDE % num_token_ids
        self._previous: Tensor | None = None  # the trainer's log-probs of the probe at the last sync
        self._report: SyncReport | None = None
        self.version: int | None = None
        """Policy version of the receiver's weights; None: it has none, or lost them."""

    def ensure(self, policy_version: int) -> None:
        """Sync unless the receiver has this version. Collective over all ranks; raises as `push`."""
        if self.version != policy_version:
            self._report = self.push(policy_version)

    def invalidate(self) -> None:
        """The receiver lost its weights: the next `ensure` sends them whatever the version."""
        self.version = None

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the last sync since the previous call; empty if nothing was sent."""
        report, self._report = self._report, None
        return {} if report is None else report.metrics()

    def push(self, policy_version: int) -> SyncReport:
        """Send all weights and verify. Collective over all ranks.

        Raises:
            StoppedError: on every rank, if the engine has other weights than the policy.
        """
        tensors = PolicyTensors(self._model)
        start = time.perf_counter()
        with self._model.onloaded():
            self._receiver.load_weights(tensors, policy_version)
        seconds = time.perf_counter() - start
        trainer = self._trainer_logprobs(self._probe)
        engine = self._receiver.prompt_logprobs(self._probe.tolist())
        gap = float((engine - trainer).abs().max())
        fault = self._altered(tensors) or self._too_far(gap) or self._stale(engine, gap)
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        first = next((one for one in faults if one is not None), None)
        if first is not None:
            raise StoppedError(f"weight sync to policy version {policy_version}: {first}; no completion was sampled")
        self._previous, self.version = trainer, policy_version
        slowest = torch.tensor([seconds, gap], dtype=torch.float64, device=device())
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return SyncReport(float(slowest[0]), tensors.num_bytes, float(slowest[1]))

    def _altered(self, tensors: PolicyTensors) -> str | None:
        sent = tensors.checksums
        for held in self._receiver.checksums_held(list(sent)):
            wrong = [name for name in held if held[name] != sent[name]]
            if wrong:
                others = f"(and {len(wrong) - 1} more of {len(held)})"
                return f"{wrong[0]} {others} has another checksum in the engine than here"
        return None

    def _stale(self, engine: Tensor, gap: float) -> str | None:
        # Rounding alone leaves the engine as far from one version as from the other.
        if self._previous is None or gap <= 2 * float((engine - self._previous).abs().max()):
            return None
        return (
            f"the engine's log-probs of the probe are those of the version before ({gap:.3g} nats from the trainer's):"
            " it kept its weights, or answers from a prefix cache that outlived them"
        )

    def _too_far(self, gap: float) -> str | None:
        if gap <= self._max_probe_gap:  # false for nan
            return None
        return (
            f"engine and trainer differ by {gap:.3g} nats in the log-prob of a probe token, more than"
            f" rollout.vllm.max_probe_gap={self._max_probe_gap:g}; `megatron-rlt parity` tells which side is wrong"
        )
