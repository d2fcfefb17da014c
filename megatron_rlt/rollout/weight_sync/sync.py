"""Brings a sampling engine to the policy's weights, and proves after every sync that it is there.

Two proofs. The weights that the engine holds as they were sent (the norms) must have the sender's checksums. And the
engine's log-probs of a fixed token sequence must be the trainer's: within a bound, and nearer to the trainer's of now
than to those of the version before, which a sync that did nothing would still give.
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
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import device
from megatron_rlt.rollout.weight_sync.policy_tensors import PolicyTensors
from megatron_rlt.types import StoppedError

_PROBE_TOKENS = 32


_PROBE_STRIDE = 7919  # a prime: the probe's ids are spread over the vocabulary


class Receiver(Protocol):
    """An engine that holds a copy of the policy."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights, and forget what the old ones cached. Every rank must exhaust the iterator."""

    def checksums_held(self, names: Sequence[str]) -> Sequence[Mapping[str, str]]:
        """Of each copy that shows its weights, `checksum` of those of the named ones that it holds as they came."""

    def prompt_logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """`[S, T - 1]` log-probs of all tokens but the first, at temperature 1, of each of S copies."""


@dataclass(frozen=True)
class SyncReport:
    """One sync that was verified."""

    seconds: float  # transfer, on the slowest rank; without the proofs
    num_bytes: int  # of the whole model
    probe_gap: float  # largest difference of a probe token's log-prob, engine against trainer, in nats

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "weight_sync_seconds": self.seconds,
            "weight_sync_gb_per_second": self.num_bytes / self.seconds / 1e9,
            "weight_sync_probe_gap": self.probe_gap,
        }


class WeightSync:
    """The way from the policy's shards to an engine's copies, in this process or another."""

    def __init__(
        self,
        model: LanguageModel,
        layout: Layout,
        receiver: Receiver,
        *,
        trainer_logprobs: Callable[[Tensor], Tensor],
        num_token_ids: int,
        max_probe_gap: float,
    ) -> None:
        """
        Args:
            trainer_logprobs: `[T]` token ids to the trainer's own `[T - 1]`; collective.
            num_token_ids: the probe's ids are below it.
            max_probe_gap: in nats.
        """
        self._model, self._layout, self._receiver = model, layout, receiver
        self._trainer_logprobs, self._max_probe_gap = trainer_logprobs, max_probe_gap
        length = min(_PROBE_TOKENS, model.architecture.max_positions)
        self._probe = torch.arange(1, length + 1) * _PROBE_STRIDE % num_token_ids
        self._before: Tensor | None = None

    def push(self, policy_version: int) -> SyncReport:
        """Send all weights and verify. Collective over all ranks.

        Raises:
            StoppedError: on every rank, if the engine has other weights than the policy.
        """
        tensors = PolicyTensors(self._model, self._layout)
        start = time.perf_counter()
        with self._model.on_device():
            self._receiver.load_weights(tensors, policy_version)
        seconds = time.perf_counter() - start
        now = self._trainer_logprobs(self._probe)
        engine = self._receiver.prompt_logprobs(self._probe.tolist())
        gap = float((engine - now).abs().max())
        fault = self._altered(tensors) or self._too_far(gap) or self._stale(engine, gap)
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        told = next((one for one in faults if one is not None), None)
        if told is not None:
            raise StoppedError(f"weight sync to policy version {policy_version}: {told}; no completion was sampled")
        self._before = now
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
        # Rounding alone leaves the engine as far from the one as from the other.
        if self._before is None or gap <= 2 * float((engine - self._before).abs().max()):
            return None
        return (
            f"the engine's log-probs of the probe are those of the version before ({gap:.3g} nats from the trainer's):"
            " it kept its weights, or answers from a prefix cache that outlived them"
        )

    def _too_far(self, gap: float) -> str | None:
        if gap <= self._max_probe_gap:  # not so for nan
            return None
        return (
            f"engine and trainer differ by {gap:.3g} nats in the log-prob of a probe token, more than"
            f" rollout.vllm.max_probe_gap={self._max_probe_gap:g}; `megatron-rlt parity` tells which side is wrong"
        )
