"""One reward from several students.

In: each student's reward of one explanation, by the student's name. Out: the reward to train on. All of them, that of
a held-out student included, are for the caller to log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

StudentReduction = Literal["mean", "minimum"]


def combine_students(rewards: Mapping[str, float], *, reduction: StudentReduction, held_out: str | None) -> float:
    """Mean or minimum over the students that are not held out; nan if one of them has no reward.

    A reward that one student cannot give would otherwise be compared, within its group, with rewards of others.

    Args:
        rewards: by student; nan for a student that has none.
        held_out: the student that is only logged; None: all count.
    """
    assert held_out is None or held_out in rewards, f"{held_out!r} is none of the students {sorted(rewards)}"
    counted = [reward for name, reward in rewards.items() if name != held_out]
    assert counted, "at least one student must count"
    if any(math.isnan(reward) for reward in counted):
        return math.nan
    return min(counted) if reduction == "minimum" else math.fsum(counted) / len(counted)
