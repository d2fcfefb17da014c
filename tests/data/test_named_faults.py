"""Rows and columns that would be misread without a word: named columns, two statements of one fact, blank text, ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.config.commands.evaluation_sets import QuestionColumnConfig
from megatron_rlt.config.commands.job import AnswerKind
from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.exercises import Exercise, read_exercises
from megatron_rlt.data.rejection import RejectedRow
from megatron_rlt.visible_text import is_blank
from tests.data.sources import GOOD, conversation, prepare, stratos_answer, write_lines

ROW = {"uid": "u1", "question": "Q?", "solution": "7", "thought": "because"}


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
        return file
    return write_lines(file, *rows)


def rejections(folder: Path) -> list[tuple[int, str, str | None]]:
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return [(row["row"], row["reason"], row["column"]) for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "columns",
    [{"reasoning_trace": "toughts"}, {"problem_id": "udi"}, {"conversations": "chat"}, {"problem_id": "Uid"}],
)
def test_a_named_column_that_no_row_has_is_refused_and_nothing_is_written(
    columns: dict[str, str], suffix: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / f"rows{suffix}", ROW, ROW | {"uid": "u2"})
    with pytest.raises(ValueError, match=f"column '{next(iter(columns.values()))}' that `columns` names"):
        prepare(tmp_path / "out", source, columns=ColumnConfig(**columns))
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_named_column_may_be_empty_in_rows_and_a_default_one_absent(suffix: str, tmp_path: Path) -> None:
    rows = [{"uid": "u1", "question": "Q?", "solution": "7", "thought": None}, ROW | {"uid": "u2"}]
    columns = ColumnConfig(reasoning_trace="thought", problem_id="uid")
    assert (
        prepare(tmp_path / "out", write_rows(tmp_path / f"rows{suffix}", *rows), columns=columns).manifest.num_rows == 2
    )
    assert prepare(tmp_path / "plain", write_rows(tmp_path / "plain.jsonl", ROW)).manifest.num_rows == 1


def test_a_named_column_of_one_of_several_sources_is_enough(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", ROW)
    second = write_lines(tmp_path / "b.jsonl", {"question": "Q2?", "solution": "8"})
    columns = ColumnConfig(reasoning_trace="thought")
    assert prepare(tmp_path / "out", first, second, columns=columns).manifest.num_rows == 2


QUESTION = {"id": "a", "question": "Q?", "answer": "B", "choices": ["x", "y"], "numbers": [1, 2], "target": 3}


def read(file: Path, kind: AnswerKind, **columns: Any) -> list[Exercise | RejectedRow]:
    columns_config = QuestionColumnConfig(**columns)
    return list(read_exercises(str(file), kind, columns_config, state_countdown=lambda *_: "reach 3"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("exact", {"problem_id": "udi"}),
        ("choice", {"choices": "options"}),
        ("countdown", {"use_all": "every"}),
        ("countdown", {"target": "goal"}),
        ("choice", {"wrong_answers": ("wrong 1",)}),
    ],
)
def test_a_named_column_of_questions_must_exist(
    kind: AnswerKind, columns: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / f"rows{suffix}", QUESTION)
    name = next(iter(columns.values()))
    with pytest.raises(ValueError, match=name if isinstance(name, str) else name[0]):
        read(file, kind, **columns)


@pytest.mark.parametrize(
    "columns", [{"solution": "question"}, {"problem_id": "solution"}, {"reasoning_trace": "conversations"}]
)
def test_two_keys_that_name_one_column_are_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"name one column, .* and must name two"):
        ColumnConfig(**columns)
    with pytest.raises(ValueError, match="answer and wrong_answers"):
        QuestionColumnConfig(answer="right", wrong_answers=("wrong", "right"))


CHAT = conversation("1 + 1?", stratos_answer("one and one", "2"))


def test_rows_that_state_a_fact_twice_are_rejected_unless_both_agree(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl",
        b'{"id": "a", "question": "1 + 1?", "solution": "2", "solution": "3"}',
        b'{"id": "b", "question": "1 + 1?", "question": "1 + 1?", "solution": "2"}',
        {**GOOD, "conversations": CHAT},
        {**GOOD, "id": "c", "solution": "3", "conversations": CHAT},
        {**GOOD, "id": "d", "question": "1 + 2?", "conversations": CHAT},
        {**GOOD, "id": "e", "conversations": [{"role": "user", "content": "of another format"}]},
        {"id": "f", "conversations": [CHAT[0] | {"role": "system"}, CHAT[1]]},
        {"id": "g", "conversations": [CHAT[0] | {"content": "another question"}, CHAT[1]]},
        {"id": "h", "conversations": [CHAT[0] | {"role": "user", "content": "1 + 1?"}, CHAT[1]]},
    )
    prepare(tmp_path / "out", source)
    assert rejections(tmp_path / "out") == [
        (1, "ambiguous", "solution"),
        (2, "ambiguous", "question"),
        (4, "ambiguous", "solution"),
        (5, "ambiguous", "question"),
        (7, "ambiguous", "conversations"),
        (8, "ambiguous", "conversations"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"choices": ["B", "A"], "answer": "A"}, "ambiguous"),  # the first letter, and the text of the second
        ({"choices": ["A", "B"], "answer": "B"}, "B"),  # its letter is its text
        ({"choices": ["x", "y", "x"], "answer": "B"}, "ambiguous"),
        ({"choices": ["x", " x"], "answer": "A"}, "ambiguous"),
        ({"choices": ["x", "y"], "answer": "y"}, "B"),
        ({"choices": ["x", "\u200b"], "answer": "A"}, "wrong_type"),
    ],
)
def test_choices_that_could_be_meant_twice_are_rejected(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (found,) = read(write_lines(tmp_path / "rows.jsonl", QUESTION | row), "choice")
    assert (found.reason.value if isinstance(found, RejectedRow) else found.problem.solution) == expected


BLANK = [
    "\u200b",
    "\ufeff",
    "\u2060\u200d",
    "\u00ad ",
    "\u180e",
    "\ufe0f",
    "\u3164",
    "\u2800",
    "\u202e\u202c",
    "\x00",
    "\u00a0\n",
]


@pytest.mark.parametrize("text", BLANK)
def test_text_that_only_looks_non_empty_is_rejected_as_empty(text: str, tmp_path: Path) -> None:
    rows = [GOOD | {"id": name, name: text} for name in ("question", "solution", "reasoning_trace")]
    source = write_lines(tmp_path / "rows.jsonl", GOOD, *rows, GOOD | {"id": text})
    prepare(tmp_path / "out", source)
    assert rejections(tmp_path / "out") == [
        (2, "empty", "question"),
        (3, "empty", "solution"),
        (4, "empty", "reasoning_trace"),
        (5, "empty", "id"),
    ]


@given(st.text(max_size=8), st.sampled_from(["x", "é", "中", "🙂", "+", "\u0e01"]))
@settings(deadline=None, database=None)
def test_one_visible_character_is_enough(around: str, visible: str) -> None:
    assert not is_blank(around + visible)
    assert not is_blank(visible + around)


@pytest.mark.parametrize(
    ("ids", "row", "said"),
    [
        (["row-2", None], 2, "id 'row-2', which stands for the missing one, was used by an earlier row"),
        ([None, "row-1"], 2, "id 'row-1' was used by an earlier row without an id"),
        ([7, "7"], 2, "id '7' was used by an earlier row"),
        (["a", "row-3", None], 3, "id 'row-3', which stands for the missing one, was used by an earlier row"),
    ],
)
def test_ids_that_collide_say_whether_they_were_made(ids: list[Any], row: int, said: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *(GOOD | {"id": one} for one in ids))
    prepare(tmp_path / "out", source)
    (rejected,) = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["row"], rejected["reason"], rejected["detail"]) == (row, "duplicate_id", said)
