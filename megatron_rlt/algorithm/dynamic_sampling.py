"""Dynamic sampling (DAPO, arXiv 2503.14476): groups whose completions all earn the same teach nothing.

In: what the completions of one batch earned. Out: which groups have spread. Sampling new questions in place of the
others, counting them, and giving up after a while are the job's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def groups_with_spread(values: Tensor, valid: Tensor, *, group_size: int, tolerance: float) -> Tensor:
    """`[Q]` bool: the groups to train on; the others are to be dropped and replaced.

    A group has spread if the largest and the smallest value of its valid completions differ by more than `tolerance`.
    One with fewer than two valid completions has none. With values 1 and 0 for right and wrong answers and tolerance 0
    this is DAPO's constraint `0 < number of right answers < G`; like DAPO, give it the verdicts and not the whole
    reward, in which terms of length or form differ always.

    Args:
        values: `[Q * group_size]`, the groups one after another.
        valid: `[Q * group_size]` bool; the others take no part, whatever their value holds.
        group_size: completions of each question.
        tolerance: differences up to it count as none; >= 0.
    """
    usable = valid.reshape(-1, group_size)
    grouped = values.double().reshape(-1, group_size)
    largest = torch.where(usable, grouped, -torch.inf).max(dim=1).values
    smallest = torch.where(usable, grouped, torch.inf).min(dim=1).values
    # No valid completion: -inf - inf is -inf; one: 0.
    return largest - smallest > tolerance
