"""Reading explanations that already exist: rows `id, question, solution, explanation` from JSONL or Parquet.

In: one file. Out, row by row in its order: a `Trace`, or a `RejectedRow` that says why not. The rules are those of
`prepare`'s rows, and two more: the id is required, and an explanation may be empty, for that is a result of a
teacher and no fault of the row. What is too long is left to those who count tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError
from megatron_rlt.data.rows import SourceRow, read_rows
from megatron_rlt.data.validation import RowValidator
from megatron_rlt.types import Problem

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
    """Every row of a file. Raises ValueError where it cannot be read at all or lacks a column."""
    _check_columns(file)
    validator = RowValidator(_COLUMNS, max_characters=sys.maxsize)
    for row in read_rows(str(file), _COLUMNS):
        if isinstance(row, RejectedRow):
            yield row
            continue
        try:
            yield _trace(row, validator)
        except UnusableRowError as error:
            yield RejectedRow(row.file, row.row, error.reason, error.column, error.detail)


def _trace(row: SourceRow, validator: RowValidator) -> Trace:
    values = {name: row.values.get(name) for name in _REQUIRED}
    for name in (_COLUMNS.problem_id, EXPLANATION):  # which `prepare` can do without
        if values[name] is None:
            raise UnusableRowError(RejectReason.MISSING, name, "absent or null")
    explanation = values[EXPLANATION]
    if isinstance(explanation, str) and not explanation.strip():
        problem = validator.problem(values | {EXPLANATION: None}, position=row.row)
        return Trace(row.row, problem, explanation)
    problem = validator.problem(values, position=row.row)
    assert problem.reasoning_trace is not None, "the validator keeps a text that it found good"
    return Trace(row.row, problem, problem.reasoning_trace)


def _check_columns(file: Path) -> None:
    """A column that a Parquet file lacks is one fault of the file, not one of every row."""
    if file.suffix != ".parquet":
        return
    try:
        present = pq.read_schema(file).names
    except (pa.ArrowException, OSError):
        return  # `read_rows` names a damaged file
    missing = [name for name in _REQUIRED if name not in present]
    if missing:
        raise ValueError(
            f"input {file} lacks the columns {', '.join(missing)} and has {', '.join(present)}; rename or add them"
        )
