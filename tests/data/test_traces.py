"""Rows of explanations: what is rejected and why; the id is required, an empty explanation is no fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.data.rejection import RejectedRow
from megatron_rlt.data.traces import Trace, read_traces

GOOD = {"id": "a", "question": "q", "solution": "s", "explanation": "e"}


def _read_one(tmp_path: Path, row: Any) -> Trace | RejectedRow:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    (found,) = read_traces(file)
    return found


@pytest.mark.parametrize("explanation", ["e", "", " \n ", "é" * 1_000_000])
def test_any_text_is_an_explanation_and_is_kept_as_it_is(tmp_path: Path, explanation: str) -> None:
    found = _read_one(tmp_path, GOOD | {"explanation": explanation, "conversations": [], "reasoning_trace": 3})
    assert isinstance(found, Trace)
    assert (found.row, found.explanation) == (1, explanation)
    assert (found.problem.problem_id, found.problem.question, found.problem.solution) == ("a", "q", "s")


def test_a_number_is_an_id(tmp_path: Path) -> None:
    found = _read_one(tmp_path, GOOD | {"id": 7})
    assert isinstance(found, Trace)
    assert found.problem.problem_id == "7"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"id": None}, "missing in column 'id'"),
        ({"explanation": None}, "missing in column 'explanation'"),
        ({"question": None, "conversations": [{"from": "user"}]}, "missing in column 'question'"),
        ({"solution": " "}, "empty in column 'solution'"),
        ({"id": 1.5}, "wrong_type in column 'id'"),
        ({"explanation": ["e"]}, "wrong_type in column 'explanation'"),
        ({"explanation": "\ud800"}, "not_utf8 in column 'explanation'"),
    ],
)
def test_a_bad_value_is_rejected_with_its_column(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    found = _read_one(tmp_path, GOOD | change)
    assert isinstance(found, RejectedRow)
    assert str(found).startswith(f"{tmp_path}/rows.jsonl row 1: {expected}: ")


def test_the_first_row_of_an_id_is_kept_and_order_and_numbers_are_the_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [GOOD, GOOD | {"explanation": "other"}, GOOD | {"id": "b"}]
    file.write_text("\n".join(["{", *map(json.dumps, rows)]))
    kinds = [(row.row, type(row).__name__) for row in read_traces(file)]
    assert kinds == [(1, "RejectedRow"), (2, "Trace"), (3, "RejectedRow"), (4, "Trace")]
