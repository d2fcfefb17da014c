"""`prepare`: every source row becomes a problem or a named rejection, and equal rows become equal bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sqlite3
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from megatron.energon.tools.prepare import command as energon_prepare

from megatron_rlt.config.commands.prepare import ColumnConfig, PrepareConfig
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.data.shards import problem_from_json, read_manifest
from megatron_rlt.jobs.prepare import run_prepare
from megatron_rlt.types import Problem
from tests.data.sources import GOOD, conversation, numbered_rows, numbered_shards, prepare, stratos_answer, write_lines


def problems_in(folder: Path) -> list[Problem]:
    """Read the shards by plain tarfile, in order."""
    found = []
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            found += [problem_from_json(tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def rejected_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_jsonl_rows_become_the_same_problems(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"id": 7, "question": "Qé?\n", "solution": " 🙂", "other": None}).encode(),
        {"question": "no id", "solution": "x", "reasoning_trace": "because"},
        {"id": None, "question": "null id", "solution": "y", "reasoning_trace": None},
    )
    report = prepare(tmp_path / "out", source, rows_per_shard=2)
    assert problems_in(tmp_path / "out") == [
        Problem("7", "Qé?\n", " 🙂", None),
        Problem("row-2", "no id", "x", "because"),
        Problem("row-3", "null id", "y", None),
    ]
    assert [shard.num_rows for shard in report.manifest.shards] == [2, 1]
    assert report.manifest.num_rejected == 0
    assert report.rejected_file.read_text() == ""


def test_parquet_rows_become_the_same_problems_with_renamed_columns(tmp_path: Path) -> None:
    table = pa.table({"Q": ["a", "b"], "A": ["1", "2"], "trace": ["t", None], "key": [10, 11], "unused": [0.5, 1.5]})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = ColumnConfig(question="Q", solution="A", reasoning_trace="trace", problem_id="key")
    prepare(tmp_path / "out", tmp_path / "a.parquet", columns=columns)
    assert problems_in(tmp_path / "out") == [Problem("10", "a", "1", "t"), Problem("11", "b", "2", None)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_bespoke_stratos_conversations_become_problems(tmp_path: Path, suffix: str) -> None:
    """Text for text, with all white space within the tags: the format's models have seen it."""
    answer = stratos_answer("think <b>hard</b>", "It is $4$.\n")
    turns = conversation("2 + 2?\n", answer)
    source = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        other = conversation("2 + 2?\n", answer, keys=("role", "content"), roles=("human", "gpt"))
        system = {"from": "system", "value": "ignored"}
        rows = [{"system": "s", "conversations": turns}, {"conversations": [system, *other]}]
        write_lines(source, *rows)
    else:
        pq.write_table(pa.table({"conversations": [turns, turns]}), source)
    prepare(tmp_path / "out", source)
    thought, solution = "\n\nthink <b>hard</b>\n\n", "\n\nIt is $4$.\n\n\n"
    expected = [Problem(f"row-{i}", "2 + 2?\n", solution, thought) for i in (1, 2)]
    assert problems_in(tmp_path / "out") == expected


def wrapped(answer: str, **more: Any) -> dict[str, Any]:
    return {"conversations": conversation("q", answer), **more}


BAD_LINES: list[tuple[bytes | dict[str, Any], str, str | None]] = [
    (b'{"question": "\xff", "solution": "x"}', "not_utf8", None),
    ({"question": "\ud800", "solution": "x"}, "not_utf8", "question"),
    (b"", "empty", None),
    (b"  \t\r", "empty", None),
    (b'{"question": "q", "solution": "x"', "not_json", None),
    (b"question,solution", "not_json", None),
    (b"[" * 100_000, "not_json", None),
    (b"1" * 10_000, "not_json", None),
    (b'["q", "x"]', "not_an_object", None),
    (b"null", "not_an_object", None),
    ({"solution": "x"}, "missing", "question"),
    ({"question": "q"}, "missing", "solution"),
    ({"question": None, "solution": "x"}, "missing", "question"),
    ({"question": "q", "solution": None}, "missing", "solution"),
    ({"question": "", "solution": "x"}, "empty", "question"),
    ({"question": "q", "solution": " \n\t"}, "empty", "solution"),
    ({"question": "q", "solution": "x", "reasoning_trace": ""}, "empty", "reasoning_trace"),
    ({"question": 3, "solution": "x"}, "wrong_type", "question"),
    ({"question": "q", "solution": ["x"]}, "wrong_type", "solution"),
    ({"question": "q", "solution": "x", "reasoning_trace": {}}, "wrong_type", "reasoning_trace"),
    ({"question": "q", "solution": "x", "id": True}, "wrong_type", "id"),
    ({"question": "q", "solution": "x", "id": 1.0}, "wrong_type", "id"),
    ({"question": "q", "solution": "x", "id": ""}, "empty", "id"),
    ({"question": "q" * 21, "solution": "x"}, "too_long", "question"),
    ({"question": "q", "solution": "x" * 21}, "too_long", "solution"),
    ({"question": "q", "solution": "x", "reasoning_trace": "t" * 21}, "too_long", "reasoning_trace"),
    ({"question": "q", "solution": "x", "id": "good"}, "duplicate_id", "id"),
    ({"conversations": "text"}, "wrong_type", "conversations"),
    ({"conversations": []}, "bad_conversation", "conversations"),
    ({"conversations": ["text", "text"]}, "bad_conversation", "conversations"),
    ({"conversations": conversation("q", "a", roles=("assistant", "user"))}, "bad_conversation", "conversations"),
    ({"conversations": conversation("q", stratos_answer("t", "s")) * 2}, "bad_conversation", "conversations"),
    (wrapped("no markers"), "bad_conversation", "conversations"),
    (wrapped(stratos_answer("t", "s") + " and more"), "bad_conversation", "conversations"),
    (wrapped(stratos_answer("t<|end_of_thought|>", "s")), "bad_conversation", "conversations"),
    (wrapped(stratos_answer("", "s")), "empty", "conversations"),
    (wrapped(stratos_answer("t", "s" * 21)), "too_long", "conversations"),
]


@pytest.mark.parametrize(("line", "reason", "column"), BAD_LINES)
def test_bad_row_is_rejected_by_name(
    tmp_path: Path, line: bytes | dict[str, Any], reason: str, column: str | None
) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD, line, {**GOOD, "id": "good too"})
    report = prepare(tmp_path / "out", source, max_characters=20)
    assert report.manifest.rejected_by_reason == {reason: 1}
    assert [problem.problem_id for problem in problems_in(tmp_path / "out")] == ["good", "good too"]
    (rejected,) = rejected_in(tmp_path / "out")
    assert (rejected["file"], rejected["row"], rejected["reason"], rejected["column"]) == (
        str(source),
        2,
        reason,
        column,
    )
    assert rejected["detail"]


def test_text_of_exactly_the_greatest_length_is_used(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"question": "é" * 20, "solution": "x" * 20})
    assert prepare(tmp_path / "out", source, max_characters=20).manifest.num_rows == 1


def test_bad_parquet_cells_cost_only_their_own_row(tmp_path: Path) -> None:
    no_utf8 = pa.array([b"ok", b"\xff\xfe", b"fine", b"4"]).view(pa.utf8())
    solutions = pa.array(["1", "2", None, "4"])
    pq.write_table(pa.table({"question": no_utf8, "solution": solutions}), tmp_path / "a.parquet")
    prepare(tmp_path / "out", tmp_path / "a.parquet")
    assert [problem.problem_id for problem in problems_in(tmp_path / "out")] == ["row-1", "row-4"]
    found = [(row["row"], row["reason"], row["column"]) for row in rejected_in(tmp_path / "out")]
    assert found == [(2, "not_utf8", "question"), (3, "missing", "solution")]


def test_every_row_of_every_file_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_lines(tmp_path / "a.jsonl", *numbered_rows(5), b"{", {"question": "no id", "solution": "x"})
    second = write_lines(tmp_path / "b.jsonl", *numbered_rows(6), {"question": "no id", "solution": "x"}, b"\xff")
    config = PrepareConfig(input=(str(first), str(second)), output_dir=tmp_path / "out", rows_per_shard=2)
    report = run_prepare(config)
    # a: p0..p4 and row-7 stay, "{" goes. b: p0..p4 are duplicates, p5 and row-14 stay, the last line is no UTF-8.
    kept = [problem.problem_id for problem in problems_in(tmp_path / "out")]
    assert kept == ["p0", "p1", "p2", "p3", "p4", "row-7", "p5", "row-14"]
    assert report.manifest.rejected_by_reason == {"duplicate_id": 5, "not_json": 1, "not_utf8": 1}
    assert report.num_source_rows == 7 + 8 == report.manifest.num_rows + len(rejected_in(tmp_path / "out"))
    assert [(row["file"], row["row"]) for row in rejected_in(tmp_path / "out")][-1] == (str(second), 8)
    printed = capsys.readouterr().out
    assert f"8 rows in 4 shards in {tmp_path / 'out'}" in printed
    assert "Rejected: 7 of 15 rows\n  duplicate_id: 5\n  not_json: 1\n  not_utf8: 1\n" in printed
    assert str(report.rejected_file) in printed


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_equal_rows_give_equal_bytes_at_any_time(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *numbered_rows(5), b"{")
    first = prepare(tmp_path / "one", source, rows_per_shard=2)
    time.sleep(1.1)  # tar headers count whole seconds
    os.utime(source, (0, 0))
    prepare(tmp_path / "two", source, rows_per_shard=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    write_lines(source, *numbered_rows(4), {**numbered_rows(5)[4], "solution": "other"})
    other = prepare(tmp_path / "three", source, rows_per_shard=2)
    assert other.manifest.content_hash != first.manifest.content_hash


def test_index_equals_that_of_energons_own_prepare(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path, 25)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for shard in folder.glob("*.tar"):
        (theirs / shard.name).write_bytes(shard.read_bytes())
    options = ["--non-interactive", "--sample-type", "CrudeWebdataset", "--split-ratio", "1,0,0", "--num-workers", "1"]
    result = CliRunner().invoke(energon_prepare, [str(theirs), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("shard-000000.tar.idx", "shard-000002.tar.idx", ".nv-meta/dataset.yaml", ".nv-meta/.info.json"):
        assert (folder / name).read_bytes() == (theirs / name).read_bytes(), name
    for query in ("SELECT * FROM samples", "SELECT * FROM sample_parts", "SELECT name FROM sqlite_master"):
        rows = [sqlite3.connect(at / ".nv-meta/index.sqlite").execute(query).fetchall() for at in (folder, theirs)]
        assert rows[0] == rows[1] != []


def test_prepared_again_the_same_data_is_left_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *numbered_rows(3), b"{")
    first = prepare(tmp_path / "out", source)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = prepare(tmp_path / "out", source)
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", GOOD)).manifest.num_rows == 1


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")
def test_hub_rows_become_problems(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", {**GOOD, "other": 1}, {"question": "q", "solution": None, "other": 2})
    report = prepare(tmp_path / "out", f"hf://{tmp_path / 'set'}:train")
    assert problems_in(tmp_path / "out") == [Problem("good", "1 + 1?", "2", None)]
    assert report.manifest.rejected_by_reason == {"missing": 1}
    with pytest.raises(ValueError, match="check name, split and network"):
        prepare(tmp_path / "other", f"hf://{tmp_path / 'set'}:absent")


def test_one_file_of_a_run_is_sharded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_lines(tmp_path / "a.jsonl", *numbered_rows(3), b"{")
    folder = ensure_shards(source, tmp_path / "run" / "data")
    assert folder.parent == tmp_path / "run" / "data"
    assert "1 of 4 rows are unusable (not_json: 1)" in caplog.text
    before = files_of(folder)
    assert ensure_shards(source, tmp_path / "run" / "data") == folder
    assert ensure_shards(folder, tmp_path / "run" / "data") == folder
    assert files_of(folder) == before
    write_lines(source, *numbered_rows(4))
    changed = ensure_shards(source, tmp_path / "run" / "data")
    assert changed != folder
    assert read_manifest(changed).num_rows == 4
