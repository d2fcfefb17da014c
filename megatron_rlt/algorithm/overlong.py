"""What becomes of completions that ran, or nearly ran, out of their token budget (DAPO, arXiv 2503.14476).

In: lengths and finish reasons as plain values. Out: who takes part in the loss, or what to add to the rewards. An
answer that was cut off may have been on the right way: its reward is noise. Either it is left out, or completions are
told to be brief before they are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def without_truncated(valid: Tensor, truncated: Sequence[bool]) -> Tensor:
    """`[N]` bool: the valid completions that were not cut off (DAPO's over-long filtering).

    Given to `token_weights` as `valid`, a truncated completion has weight 0 and counts in no denominator, while its
    reward still counts for the mean of its group; given to `group_advantages` too, it is left out of both.

    Args:
        valid: `[N]` bool, completions that have a reward.
        truncated: of N completions, whether the budget ended each.
    """
    return valid & ~torch.tensor(truncated, dtype=torch.bool)


def soft_overlong_punishment(lengths: Sequence[int], *, max_completion_tokens: int, buffer_tokens: int) -> Tensor:
    """`[N]` float64 to add to the rewards (DAPO, equation 13); times the caller's weight, if it has one.

    0 up to `max_completion_tokens - buffer_tokens` tokens, then falling evenly to -1 at `max_completion_tokens`.

    Args:
        lengths: tokens of each completion.
        max_completion_tokens: L_max, the sampling budget.
        buffer_tokens: L_cache, the last tokens of the budget, in which a completion is punished; > 0.
    """
    assert 0 < buffer_tokens <= max_completion_tokens, "the buffer is a part of the budget"
    over = torch.tensor(lengths, dtype=torch.float64) - (max_completion_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0.0, 1.0)
