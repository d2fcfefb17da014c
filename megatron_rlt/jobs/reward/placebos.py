"""Puts a placebo in an explanation's place before it is scored; `score` and `collect` share it.

What a placebo is stands in `rewards/placebo.py`; here it meets the formats.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_rlt.config.sections import Placebo
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.placebo import nothing, shuffled
from megatron_rlt.types import ScoringPair


def placebo_ids(placebo: Placebo, own_ids: Tensor, *, seed: int, other_ids: Tensor | None) -> Tensor | None:
    """The ids (`[E]` int64) in place of an explanation's; None where it is scored itself.

    Args:
        seed: of the shuffling.
        other_ids: the explanation of another question; needed by `other_question` only.
    """
    if placebo == "shuffled":
        return shuffled(own_ids, seed=seed)
    if placebo == "no_explanation":
        return nothing(own_ids)
    if placebo == "other_question":
        assert other_ids is not None, "the job looks the others up"
        return other_ids
    return None


def placebo_pair(pairs: PairBuilder, own: ScoringPair, ids: Tensor | None) -> ScoringPair:
    """What both models read with `ids` in the explanation's place; the pair itself where they are None.

    A penalty stays that of the explanation's own form, so that only the content differs.
    """
    return own if ids is None else replace(pairs.pair_from_ids(own.problem, ids.tolist()), flags=own.flags)
