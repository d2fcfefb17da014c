"""Exact KL(p || q) over the vocabulary between two models with different hidden sizes and layouts.

Every rank holds both models' hidden rows for its share of the positions. The owners of the output weights broadcast
them block by block, and each rank folds each block of both models into running sums: one sweep, no
`[rows, vocabulary]` tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.parallel.vocab_logprobs import LOWEST, matmul_fp32, slices

WeightBlocks = Iterator[tuple[int, int, Tensor]]  # (start, stop, [stop - start, H]) in vocabulary order


@torch.no_grad()
def broadcast_weight_blocks(
    weight_shard: Tensor | None,
    *,
    vocab_size: int,
    owners: Sequence[int],
    shard_rows: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    block: int,
    group: dist.ProcessGroup | None,
) -> WeightBlocks:
    """Yield one model's output weight to every rank of `group`, `block` vocabulary entries at a time. Collective.

    Each step is a broadcast, so every rank must iterate to the end, also without rows of its own.

    Args:
        weight_shard: `[shard_rows, H]` on the owners, None elsewhere.
        vocab_size: entries to yield, without padding.
        owners: global ranks that hold the shards of one replica, in vocabulary order.
        shard_rows: rows of each owner's shard, padding included.
        device: device of the blocks; the group's backend must support it.
        group: the receiving ranks, owners included; None: all ranks.
    """
    assert shard_rows * len(owners) >= vocab_size, f"{len(owners)} shards of {shard_rows} rows do not hold {vocab_size}"
    rank = dist.get_rank()
    assert (rank in owners) == (weight_shard is not None), f"rank {rank} must bring a shard exactly if it is an owner"
    for entries in slices(vocab_size, block):
        received = torch.empty(entries.stop - entries.start, hidden_size, dtype=dtype, device=device)
        # A block can span several shards: then each owner sends its piece.
        for index in range(entries.start // shard_rows, (entries.stop - 1) // shard_rows + 1):
            first = index * shard_rows
            start, stop = max(entries.start, first), min(entries.stop, first + shard_rows)
            piece = received[start - entries.start : stop - entries.start]
            if weight_shard is not None and rank == owners[index]:
                piece.copy_(weight_shard[start - first : stop - first])
            dist.broadcast(piece, src=owners[index], group=group)
        yield entries.start, entries.stop, received


def pair_weight_blocks(p_blocks: WeightBlocks, q_blocks: WeightBlocks) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Zip both models' blocks, which must cover the same entries."""
    for (start, stop, p_block), (q_start, q_stop, q_block) in zip(p_blocks, q_blocks, strict=True):
        assert (start, stop) == (q_start, q_stop), f"blocks [{start}, {stop}) and [{q_start}, {q_stop}) do not match"
        yield start, stop, p_block, q_block


@torch.no_grad()
def vocab_divergence(
    p_hidden: Tensor,
    q_hidden: Tensor,
    weight_blocks: Iterable[tuple[int, int, Tensor, Tensor]],
    *,
    temperature: float,
    row_block: int,
) -> Tensor:
    """`[R]` float32: `sum_v p_v (log p_v - log q_v)` in nats, p and q softmaxes over the blocks' vocabulary.

    Rounding in fp32 can make the sum negative by a few 1e-7; a non-finite logit makes its row nan.

    Args:
        p_hidden: `[R, H_p]`; R may be 0 and may differ between ranks.
        q_hidden: `[R, H_q]`, the same positions under the other model.
        weight_blocks: `(start, stop, [v, H_p], [v, H_q])`, together the common vocabulary; always read to the end,
            because the blocks' broadcasts are collective.
        temperature: divides both models' logits.
        row_block: rows whose logits exist at one time.
    """
    assert p_hidden.shape[0] == q_hidden.shape[0], f"{p_hidden.shape[0]} rows of p, {q_hidden.shape[0]} of q"
    sums = _RunningDivergence(p_hidden.shape[0], p_hidden.device)
    for _, _, p_block, q_block in weight_blocks:
        for rows in slices(p_hidden.shape[0], row_block):
            p_logits = matmul_fp32(p_hidden[rows], p_block.t()).div_(temperature)
            q_logits = matmul_fp32(q_hidden[rows], q_block.t()).div_(temperature)
            sums.fold(rows, p_logits, q_logits)
    return sums.divergence()


class _RunningDivergence:
    """Sums over the blocks seen so far, all relative to the running maxima of both models' logits."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.p_maximum = torch.full((num_rows,), LOWEST, device=device)
        self.q_maximum = torch.full((num_rows,), LOWEST, device=device)
        self.p_sum = torch.zeros(num_rows, device=device)  # sum of exp(p - p_maximum)
        self.q_sum = torch.zeros(num_rows, device=device)  # sum of exp(q - q_maximum)
        # sum of exp(p - p_maximum) * ((p - p_maximum) - (q - q_maximum))
        self.gap_sum = torch.zeros(num_rows, device=device)

    def fold(self, rows: slice, p_logits: Tensor, q_logits: Tensor) -> None:
        """Add one block `[r, v]` of both models' logits for `rows`; overwrites both."""
        self._raise_maxima(rows, p_logits.amax(-1), q_logits.amax(-1))
        p_logits -= self.p_maximum[rows, None]
        q_logits -= self.q_maximum[rows, None]
        self.q_sum[rows] += q_logits.exp().sum(-1)
        gap = q_logits.neg_().add_(p_logits)
        p_exponentials = p_logits.exp_()
        self.p_sum[rows] += p_exponentials.sum(-1)
        self.gap_sum[rows] += gap.mul_(p_exponentials).sum(-1)

    def divergence(self) -> Tensor:
        """E_p[p - q] - log Z_p + log Z_q; the maxima cancel."""
        return self.gap_sum / self.p_sum - self.p_sum.log() + self.q_sum.log()

    def _raise_maxima(self, rows: slice, p_block: Tensor, q_block: Tensor) -> None:
        p_maximum = torch.maximum(self.p_maximum[rows], p_block)
        q_maximum = torch.maximum(self.q_maximum[rows], q_block)
        p_shift, q_shift = self.p_maximum[rows] - p_maximum, self.q_maximum[rows] - q_maximum
        p_decay = p_shift.exp()
        self.gap_sum[rows] = (self.gap_sum[rows] + self.p_sum[rows] * (p_shift - q_shift)) * p_decay
        self.p_sum[rows] *= p_decay
        self.q_sum[rows] *= q_shift.exp()
        self.p_maximum[rows], self.q_maximum[rows] = p_maximum, q_maximum
