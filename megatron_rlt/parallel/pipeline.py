"""Runs packed batches through a model's pipeline stages with Megatron's own schedules; model and loss are callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.packed_batch import PackedBatch

T = TypeVar("T")
RunStage = Callable[[nn.Module, PackedBatch], Tensor]
"""Runs this rank's stage on a batch; receives earlier stages' output through the model's `set_input_tensor`."""


def forward_only(
    model: nn.Module,
    layout: Layout,
    batches: Sequence[PackedBatch],
    run_stage: RunStage,
    collect: Callable[[int, Tensor], T],
    *,
    on_batch: Callable[[int], None],
) -> list[T]:
    """Run every batch without gradients.

    Args:
        batches: this data-parallel replica's batches, the same on its ranks.
        collect: called on the last stage with a batch's index and the stage's output.
        on_batch: called with a batch's index when this rank begins it.

    Returns:
        The last stage's ranks return `collect`'s result per batch, the others an empty list.
    """
    if not batches:
        return []

    def collected(index: int, output: Tensor, *, non_loss_data: bool) -> T:
        assert non_loss_data
        return collect(index, output)

    with torch.no_grad():
        return _schedule(model, layout, batches, run_stage, collected, on_batch, is_forward_only=True)


def forward_backward(
    model: nn.Module,
    layout: Layout,
    batches: Sequence[PackedBatch],
    run_stage: RunStage,
    loss: Callable[[int, Tensor], tuple[Tensor, T]],
    *,
    on_batch: Callable[[int], None],
) -> list[T]:
    """Run every batch forward and backward; gradients, summed over all ranks, stay in the model's buffers.

    Args:
        batches: this replica's batches, at least one; a replica without work passes a batch of zero weight.
        loss: called on the last stage with a batch's index and the stage's output; returns this batch's share of the
            global loss, a scalar, and a record to collect.
        on_batch: called with a batch's index when this rank begins its forward pass.

    Returns:
        The collected records on the last stage's ranks; an empty list on the others.
    """
    assert batches, "a replica without work must pass a batch of zero weight, or the other replicas wait for it"

    def with_token_count(index: int, output: Tensor) -> tuple[Tensor, Tensor, T]:
        scalar, record = loss(index, output)
        # Zero tokens: the loss carries its own denominator, Megatron must not divide again.
        return scalar, torch.zeros([], dtype=torch.int, device=scalar.device), record

    return _schedule(model, layout, batches, run_stage, with_token_count, on_batch, is_forward_only=False)


def _schedule(
    model: nn.Module,
    layout: Layout,
    batches: Sequence[PackedBatch],
    run_stage: RunStage,
    finish: Callable[..., object],
    on_batch: Callable[[int], None],
    *,
    is_forward_only: bool,
) -> list[Any]:
    def step(data: Iterator[tuple[int, PackedBatch]], stage: nn.Module) -> tuple[Tensor, Callable[..., object]]:
        index, batch = next(data)
        on_batch(index)
        return run_stage(stage, batch), partial(finish, index)

    with layout:
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=enumerate(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=int(batches[0].input_ids.numel()),  # real shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=is_forward_only,
            collect_non_loss_data=is_forward_only,
        )
    return results
