"""The model being trained: one optimizer step from sequences and a loss, whatever the layout.

In: the whole batch on every rank, and the loss as a callable on the log-probs of one packed part. Out: the records
the loss returned, the same on every rank, and what the optimizer did. It knows no reward and no algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_rlt.config.sections import OptimizerConfig, ScoringConfig
from megatron_rlt.models.flops import update_flops
from megatron_rlt.models.forward import run_stage, target_logprobs
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, empty_batch, pack, share
from megatron_rlt.parallel.collectives import broadcast_record, gather_by_index
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.pipeline import forward_backward
from megatron_rlt.policy.optimizer import build_optimizer, build_scheduler, optimizer_bytes, wrap_for_training
from megatron_rlt.types import OnProgress, PackedBatch, SpannedSequence, tell_nobody

T = TypeVar("T")


RowLoss = Callable[[PackedBatch, Tensor, Tensor], tuple[Tensor, T]]
"""(batch, log-probs [R], entropy [R]) -> (scalar: this batch's share of the global loss, a record to collect)."""


@dataclass(frozen=True)
class Update(Generic[T]):
    """What one optimizer step did."""

    records: tuple[T, ...]  # one a packed batch, of all data-parallel replicas
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # the gradient was not finite, the weights did not change


class Policy:
    """A model with gradients, optimizer and schedule in one layout."""

    def __init__(
        self,
        model: LanguageModel,
        layout: Layout,
        *,
        optimizer: OptimizerConfig,
        blocks: ScoringConfig,
        temperature: float,
        micro_batch_size: int,
        num_updates: int,
        on_progress: OnProgress = tell_nobody,
    ) -> None:
        """
        Args:
            blocks: block sizes of the output layer.
            temperature: of the log-probs that losses see.
            micro_batch_size: most sequences packed into one forward-backward pass.
            num_updates: of the whole run, for the schedule.
            on_progress: told of every micro-batch.
        """
        self._on_progress = on_progress
        self.model, self.layout = model, layout
        self.wrapped = wrap_for_training(model, layout)
        self.optimizer: MegatronOptimizer = build_optimizer(self.wrapped, layout, optimizer)
        self.scheduler = build_scheduler(self.optimizer, optimizer, num_updates=num_updates)
        self.skipped_in_a_row = 0
        self.num_updates = 0  # optimizer steps that could change the weights
        self._max_skipped = optimizer.max_skipped_steps
        self._blocks, self._temperature, self._micro_batch_size = blocks, temperature, micro_batch_size

    def update(self, sequences: Sequence[SpannedSequence], loss: RowLoss[T]) -> Update[T]:
        """Take one optimizer step on the whole batch. Collective.

        Args:
            sequences: the whole batch, the same on every rank; `PackedBatch.join` picks a part's per-sequence values.
            loss: called on the last pipeline stage for each packed part.

        Raises:
            RuntimeError: the gradient was not finite in `max_skipped_steps` updates in a row.
        """
        batches = self._my_batches(sequences)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        records = forward_backward(
            self.wrapped,
            self.layout,
            batches,
            run_stage,
            lambda index, output: self._loss(batches[index], output, loss),
            on_batch=lambda index: self._on_progress(f"micro-batch {index + 1} of {len(batches)}"),
        )
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm, skipped = self._step()
        self.num_updates += int(not skipped and grad_norm > 0 and lr > 0)
        records = broadcast_record(records, source_rank=self.layout.last_stage_rank, group=self.layout.pp_group)
        by_replica = gather_by_index({self.layout.dp_rank: records}, self.layout.dp, self.layout.dp_group)
        return Update(tuple(record for part in by_replica for record in part), grad_norm, lr, skipped)

    def model_flops(self, sequences: Sequence[SpannedSequence]) -> float:
        """What `update` on these sequences costs over all ranks, as `models.flops` counts."""
        return update_flops(self.model.architecture, sequences)

    @property
    def gradient_bytes(self) -> int:
        """Of this rank's gradient buffers."""
        return sum(buffer.grad_data.nbytes for buffer in self.wrapped.buffers)

    @property
    def optimizer_bytes(self) -> int:
        """Of this rank's share of moments and main weights. Moments exist from the first update on."""
        return optimizer_bytes(self.optimizer, self.model)

    def _my_batches(self, sequences: Sequence[SpannedSequence]) -> list[PackedBatch]:
        mine = share(sequences, self.layout.dp, self.model.architecture)[self.layout.dp_rank]
        batches = pack(
            sequences, mine, max_tokens=None, max_sequences=self._micro_batch_size, alignment=alignment_of(self.layout)
        )
        return batches or [empty_batch(alignment_of(self.layout))]

    def _loss(self, batch: PackedBatch, output: Tensor, loss: RowLoss[T]) -> tuple[Tensor, T]:
        logprobs, entropy = target_logprobs(
            self.model,
            output,
            batch,
            self.layout,
            temperature=self._temperature,
            row_block=self._blocks.row_block,
            vocab_block=self._blocks.vocab_block,
        )
        return loss(batch, logprobs, entropy)

    def _step(self) -> tuple[float, bool]:
        with self.layout, torch.no_grad():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            skipped = not math.isfinite(grad_norm)
            if not skipped:
                self.optimizer.step()
        self.scheduler.step(increment=1)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self._max_skipped:
            raise RuntimeError(
                f"the gradient was not finite in {self.skipped_in_a_row} updates in a row (optimizer.max_skipped_steps="
                f"{self._max_skipped}): lower optimizer.lr, or look at the last completions for degenerate rewards"
            )
        return grad_norm, skipped
