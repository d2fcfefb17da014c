"""The model being trained: one optimizer step from sequences and a loss, in any layout.

In: the whole batch on every rank, and the loss as a callable on a packed batch's log-probs. Out: the loss's records,
the same on every rank, and the optimizer's metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rlt.config.models import ScoringConfig
from megatron_rlt.config.training import OptimizerConfig
from megatron_rlt.models.flops import update_flops
from megatron_rlt.models.forward import run_stage, target_logprobs
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, empty_batch, pack, partition_by_flops
from megatron_rlt.parallel.collectives import broadcast_record, gather_by_index
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.pipeline import forward_backward
from megatron_rlt.policy.optimizer import build_optimizer, build_scheduler, optimizer_bytes, wrap_for_training
from megatron_rlt.types import OnProgress, SpannedSequence, StoppedError, tell_nobody

T = TypeVar("T")
RowLoss = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, T]]
"""(batch, log-probs [R], entropy [R]) -> (this batch's share of the global loss, a record to collect)."""


@dataclass(frozen=True)
class Update(Generic[T]):
    """Result of one optimizer step."""

    records: tuple[T, ...]  # one per packed batch, of all data-parallel replicas
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # the gradient was not finite, or nothing was in the loss: the weights did not change


class Policy:
    """A model with gradients, optimizer and schedule in one layout."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        optimizer: OptimizerConfig,
        blocks: ScoringConfig,
        temperature: float,
        max_tokens_per_pack: int,
        micro_batch_size: int | None,
        num_updates: int,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """
        Args:
            blocks: block sizes of the output layer.
            temperature: temperature of the losses' log-probs.
            max_tokens_per_pack: tokens per forward-backward pass; a longer sequence gets a pass of its own.
            micro_batch_size: sequences per forward-backward pass at most; None: no limit.
            num_updates: optimizer steps of the whole run, for the schedule.
            on_progress: called for every micro-batch.
        """
        self._on_progress = on_progress
        self.model = model
        self.wrapped = wrap_for_training(model)
        self.optimizer: MegatronOptimizer = build_optimizer(self.wrapped, optimizer)
        self.scheduler = build_scheduler(self.optimizer, optimizer, num_updates=num_updates)
        self.skipped_in_a_row = 0
        self.num_updates = 0  # optimizer steps that could change the weights
        self._max_skipped = optimizer.max_skipped_steps
        self._blocks, self._temperature = blocks, temperature
        self._max_tokens, self._max_sequences = max_tokens_per_pack, micro_batch_size

    def update(
        self, sequences: Sequence[SpannedSequence], loss: RowLoss[T], *, nothing_counts: bool = False
    ) -> Update[T]:
        """Take one optimizer step on the whole batch. Collective.

        Args:
            sequences: the whole batch, the same on every rank; a loss picks its values with `PackedBatch.join`.
            loss: called on the last pipeline stage for each packed batch.
            nothing_counts: the loss has weight 0 for every token, so no step is taken.

        Raises:
            StoppedError: `max_skipped_steps` updates in a row took no step.
        """
        batches, layout = self._my_batches(sequences), self.model.layout
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        records = forward_backward(
            self.wrapped,
            layout,
            batches,
            run_stage,
            lambda index, output: self._loss(batches[index], output, loss),
            on_batch=lambda index: self._on_progress(f"micro-batch {index + 1} of {len(batches)}"),
        )
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm, skipped = self._step(nothing_counts=nothing_counts)
        self.num_updates += int(not skipped and grad_norm > 0 and lr > 0)
        records = broadcast_record(records, source_rank=layout.last_stage_rank, group=layout.pp_group)
        by_replica = gather_by_index({layout.dp_rank: records}, layout.dp, layout.dp_group)
        return Update(tuple(record for part in by_replica for record in part), grad_norm, lr, skipped)

    def model_flops(self, sequences: Sequence[SpannedSequence]) -> float:
        """Model FLOP of `update` on these sequences, over all ranks."""
        return update_flops(self.model.architecture, sequences)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of this rank's gradient buffers."""
        return sum(buffer.grad_data.nbytes for buffer in self.wrapped.buffers)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of this rank's share of moments and main weights. Moments exist from the first update on."""
        return optimizer_bytes(self.optimizer, self.model)

    def _my_batches(self, sequences: Sequence[SpannedSequence]) -> list[PackedBatch]:
        layout = self.model.layout
        mine = partition_by_flops(sequences, layout.dp, self.model.architecture)[layout.dp_rank]
        alignment = alignment_of(layout, token_multiple=self.model.token_multiple)
        batches = pack(
            sequences, mine, max_tokens=self._max_tokens, max_sequences=self._max_sequences, alignment=alignment
        )
        return batches or [empty_batch(alignment)]

    def _loss(self, batch: PackedBatch, output: Tensor, loss: RowLoss[T]) -> tuple[Tensor, T]:
        logprobs, entropy = target_logprobs(
            self.model,
            output,
            batch,
            temperature=self._temperature,
            row_block=self._blocks.row_block,
            vocab_block=self._blocks.vocab_block,
        )
        return loss(batch, logprobs, entropy)

    def _step(self, *, nothing_counts: bool) -> tuple[float, bool]:
        with self.model.layout, torch.no_grad():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            skipped = nothing_counts or not math.isfinite(grad_norm)
            if not skipped:
                self.optimizer.step()
        self.scheduler.step(increment=1)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self._max_skipped:
            why = "no completion was in the loss" if nothing_counts else "the gradient was not finite"
            raise StoppedError(
                f"{self.skipped_in_a_row} updates in a row changed nothing (optimizer.max_skipped_steps="
                f"{self._max_skipped}): in the last {why}. Look at the last completions for what they have in common"
                " (metrics dropped/..., truncated), and at the models' weights; or lower optimizer.lr"
            )
        return grad_norm, skipped
