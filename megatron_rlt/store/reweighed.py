"""Rewards computed again, beside what they were: one Parquet file, whose metadata names the settings of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_rlt.store.explanation_row import explanation_schema
from megatron_rlt.store.parts import table_of, write_parquet
from megatron_rlt.whole_files import real, require_writable

COLUMNS = ("id", "question", "step", "question_index", "explanation_index", "reward", "dropped", "rank")
"""Columns of an explanation that stand in the file, beside the terms of the reward."""


def write_reweighed(
    output: Path, rows: Sequence[Mapping[str, Any]], terms: Sequence[str], identity: Mapping[str, Any]
) -> None:
    """Write `COLUMNS`, `terms`, `old_reward`, `old_rank`, whole or not at all; `identity`: source and settings."""
    kept = [column for column in explanation_schema(terms, None) if column.name in (*COLUMNS, *terms)]
    old = [("old_reward", pa.float64()), ("old_rank", pa.int64())]
    schema = pa.schema([*kept, *old], {b"megatron_rlt.reweigh": json.dumps(identity)})
    require_writable("output", real(output).parent)
    write_parquet(output, [table_of(rows, schema)], schema)
