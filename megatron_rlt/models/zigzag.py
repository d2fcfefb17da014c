"""How context parallelism cuts a sequence: into 2 x cp chunks, of which rank r holds r and the r-th from the end.

A causal sequence costs more towards its end; so every rank has the same share of it. The order is Megatron's
(`get_batch_on_this_cp_rank`) and Transformer Engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_chunks(cp: int, cp_rank: int) -> tuple[int, int]:
    """The two chunks of a rank, in the order in which it holds them."""
    return cp_rank, 2 * cp - 1 - cp_rank


def zigzag_part(whole: Tensor, cp: int, cp_rank: int) -> Tensor:
    """A rank's part `[L / cp, ...]` of one sequence's `[L, ...]`, L a multiple of 2 x cp."""
    chunks = whole.reshape(2 * cp, -1, *whole.shape[1:])
    return chunks[list(zigzag_chunks(cp, cp_rank))].flatten(0, 1)


def zigzag_whole(parts: Tensor) -> Tensor:
    """One sequence's `[L, ...]` from the parts of all ranks, `[cp, L / cp, ...]`."""
    front, back = parts.chunk(2, dim=1)
    return torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)])
