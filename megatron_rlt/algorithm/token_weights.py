"""Weight of each token in the loss, with the denominator of the whole update, and DAPO's over-long rules.

The loss of an update is a plain sum of per-token terms, so it does not depend on how the batch is split. The weights of
`token_weights` sum to 1; those of `constant_token_weights` to at most 1.
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
        lengths, valid: tokens of every completion of the update over all ranks, and whether it is trained on.
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
    authors' code divides by the sampling budget L = `max_completion_tokens`, which only scales the learning rate. Use
    it with advantages without division by the standard deviation. `lengths` and `valid` as in `token_weights`.
    """
    assert all(length <= max_completion_tokens for length in lengths), f"a completion has over {max_completion_tokens}"
    tokens = torch.tensor(lengths, dtype=torch.float64)
    counted = torch.tensor(valid, dtype=torch.bool) & (tokens > 0)
    return torch.where(counted, 1.0 / (max_completion_tokens * counted.sum().double()), 0.0)


def without_truncated(valid: Tensor, truncated: Sequence[bool]) -> Tensor:
    """`[N]` bool: valid completions that were not truncated (over-long filtering of DAPO, arXiv 2503.14476).

    The reward of a truncated completion is noise: it may have been about to answer correctly. Pass the result to
    `token_weights` as `valid` to give it weight 0 in the loss, and to `group_advantages` to ignore its reward too.
    """
    return valid & ~torch.tensor(truncated, dtype=torch.bool)


def soft_overlong_punishment(lengths: Sequence[int], *, max_completion_tokens: int, buffer_tokens: int) -> Tensor:
    """`[N]` float64 to add to the rewards (DAPO, equation 13).

    0 up to `max_completion_tokens - buffer_tokens` (L_max - L_cache) tokens, then linear to -1 at
    `max_completion_tokens`. `lengths` are tokens per completion.
    """
    assert 0 < buffer_tokens <= max_completion_tokens, "the buffer is a part of the budget"
    over = torch.tensor(lengths, dtype=torch.float64) - (max_completion_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0.0, 1.0)
