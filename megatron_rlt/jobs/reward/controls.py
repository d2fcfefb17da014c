"""Puts a control in an explanation's place before it is scored; what a control is stands in `rewards/control.py`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_rlt.config.reward import Control as Control
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.control import empty_explanation, shuffled
from megatron_rlt.types import ScoringPair


def control_ids(control: Control, own_ids: Tensor, *, seed: int, other_ids: Tensor | None) -> Tensor | None:
    """The ids `[E]` int64 in an explanation's place, or None; only `other_question` needs `other_ids`."""
    if control == "shuffled":
        return shuffled(own_ids, seed=seed)
    if control == "no_explanation":
        return empty_explanation(own_ids)
    if control == "other_question":
        assert other_ids is not None, "the job looks the others up"
        return other_ids
    return None


def control_pair(pairs: PairBuilder, own: ScoringPair, ids: Tensor | None) -> ScoringPair:
    """What both models read with `ids` in the explanation's place; the pair itself where they are None.

    A penalty stays that of the explanation's own form, so that only the content differs.
    """
    return own if ids is None else replace(pairs.pair_from_ids(own.problem, ids.tolist()), flags=own.flags)
