"""How much each token counts in the loss, with the denominator of the whole update.

The weights of one update sum to 1 over all ranks and micro-batches, so its loss is a plain sum of per-token terms
and does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean"]


def token_weights(lengths: Sequence[int], valid: Sequence[bool], *, aggregation: Aggregation) -> Tensor:
    """`[N]` float64: the weight of each token of each completion of one update.

    Invalid and empty completions get 0 and count in no denominator.

    Args:
        lengths: tokens of every completion of the update, over all ranks.
        valid: whether each takes part.
        aggregation: `sequence_mean`: mean over a completion's tokens, then over completions (paper);
            `token_mean`: mean over all tokens.
    """
    tokens = torch.tensor(lengths, dtype=torch.float64)
    counted = torch.tensor(valid, dtype=torch.bool) & (tokens > 0)
    if aggregation == "token_mean":
        return torch.where(counted, 1.0 / tokens[counted].sum(), 0.0)
    return torch.where(counted, 1.0 / (tokens * counted.sum()), 0.0)
