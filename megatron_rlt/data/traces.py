"""Reads existing explanations: rows `id, question, solution, explanation` from JSONL or Parquet.

Yields one `Trace` or `RejectedRow` per row. The rules of `prepare` apply, except that the id is required and that an
explanation may be empty: an empty one is a teacher's result, not a faulty row. Callers check token counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError
from megatron_rlt.data.rows import SourceRow, convert_rows, read_columns
from megatron_rlt.data.validation import RowValidator
from megatron_rlt.types import Problem
from megatron_rlt.visible_text import is_blank

EXPLANATION = "explanation"
_COLUMNS = ColumnConfig(reasoning_trace=EXPLANATION)
_REQUIRED = (_COLUMNS.problem_id, _COLUMNS.question, _COLUMNS.solution, EXPLANATION)


@dataclass(frozen=True)
class Trace:
    """One explanation of one problem."""

    row: int  # 1-based in its file
    problem: Problem
    explanation: str


def read_traces(file: Path) -> Iterator[Trace | RejectedRow]:
    """Read every row of a file. Raises ValueError if it cannot be read at all or lacks a column."""
    validator = RowValidator(_COLUMNS, max_characters=sys.maxsize)
    rows = read_columns(str(file), partial(_wanted_columns, file), streaming=True)
    return convert_rows(rows, lambda row: _trace(row, validator))


def _trace(row: SourceRow, validator: RowValidator) -> Trace:
    values = {name: row.values.get(name) for name in _REQUIRED}
    for name in (_COLUMNS.problem_id, EXPLANATION):  # optional in `prepare`
        if values[name] is None:
            raise UnusableRowError(RejectReason.MISSING, name, "absent or null")
    explanation = values[EXPLANATION]
    if isinstance(explanation, str) and is_blank(explanation):
        return Trace(row.row, validator.problem(values | {EXPLANATION: None}, position=row.row), explanation)
    problem = validator.problem(values, position=row.row)
    assert problem.reasoning_trace is not None, "the validator keeps valid text"
    return Trace(row.row, problem, problem.reasoning_trace)


def _wanted_columns(file: Path, present: list[str]) -> list[str]:
    """The columns to read; a missing one is reported once, not once per row."""
    if missing := [name for name in _REQUIRED if name not in present]:
        raise ValueError(
            f"input {file} lacks the columns {', '.join(missing)} and has {', '.join(present)}; rename or add them"
        )
    return list(_REQUIRED)
