"""Rows of questions with checkable answers: what each kind may look like, and what is rejected by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.config.commands.evaluation_sets import QuestionColumnConfig
from megatron_rlt.config.commands.job import AnswerKind
from megatron_rlt.data.exercises import Exercise, read_exercises
from megatron_rlt.data.rejection import RejectedRow
from megatron_rlt.types import Problem
from tests.data.sources import write_lines


def _state(numbers: Sequence[int], target: int, use_all: bool | None, question: object) -> str:
    rule = "as asked" if question is not None else "as configured"
    return f"reach {target} with {list(numbers)}, {rule if use_all is None else ('all' if use_all else 'any')}"


def _read(file: Path, kind: AnswerKind, **columns: Any) -> list[Exercise | RejectedRow]:
    return list(read_exercises(str(file), kind, QuestionColumnConfig(**columns), state_countdown=_state))


def _rejections(rows: list[Exercise | RejectedRow]) -> list[tuple[int, str, str | None]]:
    return [(row.row, row.reason.value, row.column) for row in rows if isinstance(row, RejectedRow)]


def test_answers_may_be_numbers_and_ids_may_be_absent(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "rows.jsonl",
        {"id": "a", "question": "1+2?", "answer": "3", "level": 5},
        {"question": "2*3?", "answer": 6},
        {"id": 7, "question": "1/2?", "answer": 0.5},
        {"question": "Small?", "answer": 0.00001},
        {"question": "Large?", "answer": 1e16},
    )
    assert _read(file, "math") == [
        Exercise(1, Problem("a", "1+2?", "3"), ()),
        Exercise(2, Problem("row-2", "2*3?", "6"), ()),
        Exercise(3, Problem("7", "1/2?", "0.5"), ()),
        Exercise(4, Problem("row-4", "Small?", "0.00001"), ()),  # not 1e-05, whose e would be Euler's
        Exercise(5, Problem("row-5", "Large?", "10000000000000000"), ()),
    ]


def test_bad_rows_are_rejected_by_reason_and_column_and_the_others_kept(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "rows.jsonl",
        {"id": "a", "question": "1+2?"},
        {"id": "b", "answer": "3"},
        {"id": "c", "question": "1+2?", "answer": True},
        {"id": "d", "question": " ", "answer": "3"},
        b"[1]",
        {"id": "e", "question": "1+2?", "answer": "3"},
        {"id": "e", "question": "2+2?", "answer": "4"},
    )
    rows = _read(file, "exact")
    assert _rejections(rows) == [
        (1, "missing", "answer"),
        (2, "missing", "question"),
        (3, "wrong_type", "answer"),
        (4, "empty", "question"),
        (5, "not_an_object", None),
        (7, "duplicate_id", "id"),
    ]
    assert [row.problem.problem_id for row in rows if isinstance(row, Exercise)] == ["e"]


def test_a_choice_is_a_letter_or_the_text_of_one_of_the_choices(tmp_path: Path) -> None:
    three = {"question": "Which?", "choices": ["red", "B", 4]}
    file = write_lines(
        tmp_path / "rows.jsonl",
        three | {"answer": "C"},
        three | {"answer": "a"},
        three | {"answer": 4},
        three | {"answer": "B"},  # the text of the second choice, which is its letter too
        {"question": "Which? A) red B) blue", "answer": "B"},
        three | {"answer": "D"},
        three | {"answer": "blue"},
        {"question": "Which?", "choices": "red, blue", "answer": "A"},
        {"question": "Which?", "choices": ["red", None], "answer": "A"},
        {"question": "Which?", "choices": ["red"], "answer": "A"},
    )
    rows = _read(file, "choice")
    kept = [row for row in rows if isinstance(row, Exercise)]
    assert [row.problem.solution for row in kept] == ["C", "A", "C", "B", "B"]
    assert [row.choices for row in kept] == [("red", "B", "4")] * 4 + [()]
    assert _rejections(rows) == [
        (6, "unreadable_answer", "answer"),
        (7, "unreadable_answer", "answer"),
        (8, "wrong_type", "choices"),
        (9, "wrong_type", "choices"),
        (10, "wrong_type", "choices"),
    ]


def test_wrong_answers_are_shuffled_with_the_right_one_by_the_question_alone(tmp_path: Path) -> None:
    columns = {"question": "Question", "answer": "Correct", "wrong_answers": ["Wrong 1", "Wrong 2", "Wrong 3"]}
    rows = [
        {"Question": f"Q{number}?", "Correct": "right", "Wrong 1": "w1", "Wrong 2": "w2", "Wrong 3": "w3"}
        for number in range(40)
    ]
    forwards = _read(write_lines(tmp_path / "a.jsonl", *rows), "choice", **columns)
    backwards = _read(write_lines(tmp_path / "b.jsonl", *reversed(rows)), "choice", **columns)
    asked = [(row.problem.question, row.problem.solution, row.choices) for row in forwards if isinstance(row, Exercise)]
    again = [
        (row.problem.question, row.problem.solution, row.choices) for row in backwards if isinstance(row, Exercise)
    ]
    assert sorted(asked) == sorted(again)
    assert len(asked) == 40
    for _, letter, choices in asked:
        assert sorted(choices) == ["right", "w1", "w2", "w3"]
        assert choices["ABCD".index(letter)] == "right"
    assert {letter for _, letter, _ in asked} == set("ABCD")
    short = _read(write_lines(tmp_path / "c.jsonl", rows[0] | {"Wrong 2": None}), "choice", **columns)
    assert _rejections(short) == [(1, "missing", "Wrong 2")]


def test_a_countdown_row_states_its_task_or_has_it_stated(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "rows.jsonl",
        {"numbers": [3, 5, 2], "target": 16},
        {"question": "Use the numbers 1, 2 to make 3.", "answer": "1 + 2"},
        {"question": "Use the numbers 1, 2 to make 3.", "numbers": [1, 2], "target": 3},
        {"numbers": [3, "5"], "target": 16},
        {"numbers": [3, 5], "target": None},
        {"target": 16},
        {"numbers": [3, 5], "target": 15, "use_all": "yes"},
        {"question": "Reach it.", "answer": "3 * 5", "numbers": [3, 5], "target": 15, "use_all": False},
    )
    rows = _read(file, "countdown")
    kept = [(row.problem.question, row.problem.solution) for row in rows if isinstance(row, Exercise)]
    assert kept == [
        ("reach 16 with [3, 5, 2], as configured", "reach 16 with [3, 5, 2], as configured"),
        ("Use the numbers 1, 2 to make 3.", "1 + 2"),
        ("Use the numbers 1, 2 to make 3.", "reach 3 with [1, 2], as asked"),
        ("Reach it.", "reach 15 with [3, 5], any"),
    ]
    assert _rejections(rows) == [
        (4, "wrong_type", "numbers"),
        (5, "wrong_type", "target"),
        (6, "missing", "question"),
        (7, "wrong_type", "use_all"),
    ]


def test_a_parquet_file_without_a_needed_column_is_refused_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": ["1+2?"], "solution": ["3"]}), file)
    with pytest.raises(ValueError, match="lacks the columns answer and has question, solution; name yours under"):
        _read(file, "math")
    assert _read(file, "math", answer="solution") == [Exercise(1, Problem("row-1", "1+2?", "3"), ())]
    with pytest.raises(ValueError, match="lacks the columns answer, wrong and has"):
        _read(file, "choice", wrong_answers=["wrong"])
    pq.write_table(pa.table({"nums": [[3, 5]], "target": [8]}), file)
    task = "reach 8 with [3, 5], as configured"
    assert _read(file, "countdown", numbers="nums") == [Exercise(1, Problem("row-1", task, task), ())]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")
def test_a_hub_set_is_read_by_its_column_names(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "test.jsonl", {"unique_id": "u1", "problem": "1+2?", "answer": "3", "level": 5})
    columns = QuestionColumnConfig(question="problem", problem_id="unique_id")
    source = f"hf://{tmp_path / 'set'}"
    found = list(read_exercises(f"{source}:test", "math", columns, state_countdown=_state))
    assert found == [Exercise(1, Problem("u1", "1+2?", "3"), ())]
    with pytest.raises(ValueError, match="lacks the columns question and has unique_id, problem"):
        list(read_exercises(f"{source}:test", "math", QuestionColumnConfig(), state_countdown=_state))
    with pytest.raises(ValueError, match="a set fetched once with network is found again without"):
        list(read_exercises(f"{source}:absent", "math", columns, state_countdown=_state))
