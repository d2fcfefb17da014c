"""Context parallelism splits a sequence into 2 x cp chunks; rank r holds chunk r and the r-th from the end.

This balances causal attention, which costs more towards the end. The order is Megatron's
(`get_batch_on_this_cp_rank`) and Transformer Engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_chunks(cp: int, cp_rank: int) -> tuple[int, int]:
    """Indices of a rank's two chunks, in the order in which it holds them."""
    return cp_rank, 2 * cp - 1 - cp_rank


def zigzag_part(whole: Tensor, cp: int, cp_rank: int) -> Tensor:
    """A rank's part `[L / cp, ...]` of a sequence `[L, ...]`, L a multiple of 2 x cp."""
    chunks = whole.reshape(2 * cp, -1, *whole.shape[1:])
    return chunks[list(zigzag_chunks(cp, cp_rank))].flatten(0, 1)


def zigzag_whole(parts: Tensor) -> Tensor:
    """The sequence `[L, ...]` from the parts of all ranks, `[cp, L / cp, ...]`."""
    front, back = parts.chunk(2, dim=1)
    return torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)])
