"""How much each token counts in the loss, with the denominator of the whole update.

The loss of one update is a plain sum of per-token terms over all ranks and micro-batches and does not depend on how
the batch was split. The weights of `token_weights` sum to 1; those of `constant_token_weights` to at most 1.
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


def constant_token_weights(lengths: Sequence[int], valid: Sequence[bool], *, max_completion_tokens: int) -> Tensor:
    """`[N]` float64: Dr.GRPO's weights (arXiv 2503.20783), the same for every token of every completion of a run.

    Their loss is `1/N sum_i 1/L sum_t (...)` over the N valid completions with tokens, with the constant L in place of
    completion i's length: a long wrong answer is not spared for being long. The published formula has no 1/L; the
    authors' code divides by the sampling budget, and the constant only scales the learning rate. Goes with advantages
    without division by the standard deviation.

    Args:
        lengths: tokens of every completion of the update, over all ranks.
        valid: whether each takes part.
        max_completion_tokens: L, the most tokens a completion can have.
    """
    assert all(length <= max_completion_tokens for length in lengths), f"a completion has over {max_completion_tokens}"
    tokens = torch.tensor(lengths, dtype=torch.float64)
    counted = torch.tensor(valid, dtype=torch.bool) & (tokens > 0)
    return torch.where(counted, 1.0 / (max_completion_tokens * counted.sum().double()), 0.0)


# What becomes of completions that ran, or nearly ran, out of their token budget (DAPO, arXiv 2503.14476).
#
# In: lengths and finish reasons as plain values. Out: who takes part in the loss, or what to add to the rewards. An
# answer that was cut off may have been on the right way: its reward is noise. Either it is left out, or completions
# are
# told to be brief before they are cut off.
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
