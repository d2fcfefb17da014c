"""The input of one model call: several sequences end to end. `models/packing.py` builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Several sequences end to end; the last entry of `lengths` may be padding for alignment.

    Rows are positions whose hidden state predicts a wanted token. With context parallelism a rank's batch holds part of
    the tokens (t) and their rows (r); without, t is T and r is R.
    """

    input_ids: Tensor  # [t] int64, T a multiple of the layout's alignment
    position_ids: Tensor  # [t] int64, restarting at 0 for every sequence
    lengths: tuple[int, ...]  # whole pack: sequence lengths including padding; sums to T
    num_tokens: int  # whole pack: tokens without padding
    sequence_indices: tuple[int, ...]  # the caller's index of each packed sequence
    rows: Tensor  # [r] int64 into t
    targets: Tensor  # [r] int64 token ids
    row_counts: tuple[int, ...]  # wanted tokens per packed sequence; sums to R
    own_rows: Tensor | None  # [r] int64 into R: this rank's rows of the pack; None: all

    def join(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """Concatenate the packed sequences' tensors (`[N_i]` each, in the caller's order) to `[R]`."""
        parts = [per_sequence[index] for index in self.sequence_indices]
        return torch.cat(parts) if parts else torch.empty(0)

    def split(self, per_row: Tensor) -> tuple[Tensor, ...]:
        """Split `[R]` values into one `[N_i]` tensor per entry of `sequence_indices`."""
        return torch.split(per_row, list(self.row_counts))
