"""Rewards computed again, beside what they were: one Parquet file with a row an explanation.

In: old and new rewards with their ranks. Out: the file, which names the settings of both. Computing them is the job's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_rlt.store.parts import table_of, write_parquet
from megatron_rlt.store.scores import PARTS
from megatron_rlt.types import RewardParts

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("explanation_index", pa.int64()),
        ("old_reward", pa.float64()),
        ("old_rank", pa.int64()),
        *((name, pa.float64()) for name in PARTS),
        ("rank", pa.int64()),
    ]
)


_IDENTITY_KEY = b"megatron_rlt.reweigh"


@dataclass(frozen=True, eq=False)
class ReweighedRow:
    """One explanation; ranks are among those of its question, 1 is the best."""

    problem_id: str
    question: str
    explanation_index: int
    old_reward: float | None
    old_rank: int | None
    parts: RewardParts | None  # None: there is nothing to compute them from
    rank: int | None

    def cells(self) -> dict[str, Any]:
        """Values by column; what is not a number becomes null."""
        found = {} if self.parts is None else vars(self.parts)
        scalars = {name: found.get(name) for name in PARTS}
        return {
            "id": self.problem_id,
            "question": self.question,
            "explanation_index": self.explanation_index,
            "old_reward": self.old_reward,
            "old_rank": self.old_rank,
            **{name: None if value is None or math.isnan(value) else value for name, value in scalars.items()},
            "rank": self.rank,
        }


def write_reweighed(output: Path, rows: Sequence[ReweighedRow], identity: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all.

    Args:
        identity: JSON values by name: the source, and the settings of the old and the new rewards.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    schema = _SCHEMA.with_metadata({_IDENTITY_KEY: json.dumps(identity)})
    write_parquet(output, [table_of([row.cells() for row in rows], schema)], schema)
