"""Log-probs of given tokens and the entropy of their distributions, without a `[rows, vocabulary]` tensor.

In: hidden states of the wanted rows and this rank's shard of the output weight. Out: one log-prob and one entropy per
row, float32, the same on every rank of the tensor-parallel group. One sweep over blocks of the vocabulary keeps a
running log-sum-exp (a vocabulary block stays in cache, a row chunk would not); the backward pass recomputes each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.models import BLOCKS

# Stands for "no entry seen yet". Not -inf: the difference of two of them would be nan.
LOWEST = torch.finfo(torch.float32).min


def block_sizes(device: torch.device, row_block: int | None, vocab_block: int | None) -> tuple[int, int]:
    """Rows and vocabulary entries of a block of logits; None stands for the device's own."""
    rows, entries = BLOCKS[device.type]
    return row_block or rows, vocab_block or entries


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    row_block: int | None,
    vocab_block: int | None,
) -> tuple[Tensor, Tensor]:
    """`log softmax(hidden @ weight.T / temperature)[targets]` and the entropy of that softmax.

    Args:
        hidden: `[R, H]`, equal on all ranks of the group; R may be 0.
        weight: `[V_shard, H]` of the same dtype; the shard of rank r holds vocabulary entries from `r * V_shard`.
        targets: `[R]` token ids below `vocab_size`.
        temperature: divides the logits.
        vocab_size: later entries are padding and have no probability.
        tp_group: ranks that hold the shards; None: `weight` is whole.
        row_block, vocab_block: at most `row_block x vocab_block` logits exist at one time (two float32 copies); None:
            `block_sizes` of the device.

    Returns:
        Log-probs `[R]` and entropy `[R]` in nats, float32. Log-probs are differentiable in `weight` and `hidden` (this
        shard's part of the gradient; the caller sums it over the group). A non-finite logit makes its row nan.
    """
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
    assert bool(((targets >= 0) & (targets < vocab_size)).all()), f"a target lies outside 0..{vocab_size - 1}"
    start = 0 if tp_group is None else weight.shape[0] * dist.get_rank(tp_group)
    num_entries = min(max(vocab_size - start, 0), weight.shape[0])
    blocks = _Blocks(start, num_entries, *block_sizes(hidden.device, row_block, vocab_block))
    outputs: tuple[Tensor, Tensor] = _VocabLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, blocks, tp_group
    )
    return outputs


@dataclass(frozen=True)
class _Blocks:
    """How one rank splits its `[rows, shard]` logits into blocks."""

    shard_start: int  # vocabulary entry of the shard's first row
    num_entries: int  # rows of the shard without padding
    row_block: int
    vocab_block: int

    def entries(self) -> Iterator[slice]:
        return slices(self.num_entries, self.vocab_block)

    def rows(self, num_rows: int) -> Iterator[slice]:
        return slices(num_rows, self.row_block)

    def columns(self, targets: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
        """Column of each target in a block `[r, 1]` (0 if it lies in another block), and whether it lies in this."""
        column = targets - (self.shard_start + entries.start)
        inside = (column >= 0) & (column < entries.stop - entries.start)
        return torch.where(inside, column, 0)[:, None], inside


def slices(total: int, step: int) -> Iterator[slice]:
    """Split `range(total)` into slices of `step` entries; the last may be shorter."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


class RunningSoftmax:
    """Softmax sums per row over the logits seen so far, relative to their running maximum."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.maximum = torch.full((num_rows,), LOWEST, device=device)
        self.exp_sum = torch.zeros(num_rows, device=device)  # sum of exp(logit - maximum)
        self.mean_sum = torch.zeros(num_rows, device=device)  # sum of exp(logit - maximum) * (logit - maximum)

    def fold(self, rows: slice, logits: Tensor) -> None:
        """Add one block `[r, v]` for `rows`; overwrites `logits`."""
        self._raise_maximum(rows, torch.maximum(self.maximum[rows], logits.amax(-1)))
        logits -= self.maximum[rows, None]
        exponentials = logits.exp()
        self.exp_sum[rows] += exponentials.sum(-1)
        self.mean_sum[rows] += exponentials.mul_(logits).sum(-1)

    def join_shards(self, group: dist.ProcessGroup | None, shifted_target: Tensor) -> Tensor:
        """Sum over the group's shards; returns the owner's `shifted_target`. Collective."""
        if group is None or group.size() == 1:
            return shifted_target
        parts = torch.stack([self.exp_sum, self.mean_sum, shifted_target])
        dist.all_reduce(parts, group=group)
        self.exp_sum, self.mean_sum = parts[0], parts[1]
        return parts[2]

    def share_maximum(self, group: dist.ProcessGroup | None) -> None:
        """Rescale the shard's sums to the group's maximum. Collective."""
        if group is None or group.size() == 1:
            return
        maximum = self.maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        self._raise_maximum(slice(None), maximum)

    def entropy(self) -> Tensor:
        """`[R]` nats: log Z - E[logit], both relative to the maximum."""
        return self.exp_sum.log() - self.mean_sum / self.exp_sum

    def _raise_maximum(self, rows: slice, maximum: Tensor) -> None:
        shift = self.maximum[rows] - maximum
        self.mean_sum[rows] = (self.mean_sum[rows] + self.exp_sum[rows] * shift) * shift.exp()
        self.exp_sum[rows] *= shift.exp()
        self.maximum[rows] = maximum


class _VocabLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context takes any attribute
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        blocks: _Blocks,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        softmax = RunningSoftmax(hidden.shape[0], hidden.device)
        target_logit = torch.zeros_like(softmax.maximum)
        owned = torch.zeros_like(targets, dtype=torch.bool)
        for entries in blocks.entries():
            for rows in blocks.rows(hidden.shape[0]):
                logits = matmul_fp32(hidden[rows], weight[entries].t()).div_(temperature)
                column, inside = blocks.columns(targets[rows], entries)
                target_logit[rows] = torch.where(inside, logits.gather(1, column)[:, 0], target_logit[rows])
                owned[rows] |= inside
                softmax.fold(rows, logits)
        softmax.share_maximum(tp_group)
        shifted_target = softmax.join_shards(tp_group, torch.where(owned, target_logit - softmax.maximum, 0.0))
        ctx.save_for_backward(hidden, weight, targets, softmax.maximum, softmax.exp_sum)
        ctx.temperature, ctx.blocks = temperature, blocks
        entropy = softmax.entropy()
        ctx.mark_non_differentiable(entropy)
        return shifted_target - softmax.exp_sum.log(), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """d logprob / d logit = (onehot - softmax) / temperature, one block at a time."""
        hidden, weight, targets, maximum, exp_sum = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        per_row = grad_logprobs.float() / ctx.temperature
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for entries in blocks.entries():
            block = weight[entries]
            grad_block = torch.zeros_like(block, dtype=torch.float32)
            for rows in blocks.rows(hidden.shape[0]):
                grad = matmul_fp32(hidden[rows], block.t()).div_(ctx.temperature).sub_(maximum[rows, None]).exp_()
                grad *= (-per_row[rows] / exp_sum[rows])[:, None]
                column, inside = blocks.columns(targets[rows], entries)
                grad.scatter_add_(1, column, torch.where(inside, per_row[rows], 0.0)[:, None])
                if grad_hidden is not None:
                    grad_hidden[rows] += matmul_fp32(grad, block)
                if grad_weight is not None:
                    grad_block += matmul_fp32(grad.t(), hidden[rows])
            if grad_weight is not None:
                grad_weight[entries] = grad_block.to(weight.dtype)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """`left` `[M, K]` @ `right` `[K, N]` -> `[M, N]` float32; `left` is rounded to `right`'s dtype first.

    A bf16 result would have 8 bits: a logit of 12, and its log-prob, would be off by up to 0.03. Tensor cores and AMX
    sum exact products in fp32 anyway, so the unrounded sum costs nothing.
    """
    if right.dtype == torch.float32:
        return left.float() @ right
    if right.is_cuda:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    with _bf16_allowed(right.dtype == torch.bfloat16):
        return left.to(right.dtype).float() @ right.float()


@contextmanager
def _bf16_allowed(allowed: bool) -> Iterator[None]:
    """Run the CPU's fp32 matrix products on its bf16 units: exact here, because the operands hold bf16 values.

    Measured on one AMX core: 487 GFLOP/s against 167 without, equal to 3e-5. `aten::mm` has `out_dtype` on CUDA only.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set on the module at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if allowed else before
    try:
        yield
    finally:
        matmul.fp32_precision = before
