"""`prepare` refuses by name what it cannot use or would overwrite, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.data.prepare import ensure_shards
from tests.data.sources import GOOD, numbered_rows, prepare, write_lines


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("settings", "rows"), [({}, numbered_rows(4)), ({"rows_per_shard": 2}, numbered_rows(3)), ({}, [GOOD])]
)
def test_output_folder_with_another_data_set_is_refused(
    tmp_path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    folder = prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *numbered_rows(3))).output_dir
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"out holds another data set \(3 rows of .*a.jsonl"):
        prepare(folder, write_lines(tmp_path / "b.jsonl", *rows), **settings)
    assert files_of(folder) == before


def test_output_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match="holds no prepared data set: name another"):
        prepare(tmp_path, source)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([], {}, "no usable row in .*a.jsonl: it has no rows"),
        ([b"{", b"\xff", b"{"], {}, r"no usable row in .*all 3 rows were rejected \(not_json: 2, not_utf8: 1\)"),
        ([b"{", GOOD], {"max_rejected_fraction": 0.4}, r"1 of 2 rows were rejected \(not_json: 1\).*fraction 0.4"),
        ([b"{", GOOD], {"max_rejected_fraction": 0.4}, r"a.jsonl row 1: not_json: Expecting property name"),
    ],
)
def test_refused_data_leaves_nothing_behind(
    tmp_path: Path, lines: list[Any], settings: dict[str, Any], message: str
) -> None:
    source = write_lines(tmp_path / "a.jsonl", *lines)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prepare(tmp_path / "out", source, **settings)
    assert list(tmp_path.iterdir()) == [source]


def test_rejected_rows_up_to_the_allowed_share_pass(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", b"{", GOOD)
    assert prepare(tmp_path / "out", source, max_rejected_fraction=0.5).manifest.num_rejected == 1


def test_bad_sources_are_refused_before_any_row_is_read(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", GOOD)
    (tmp_path / "a.csv").write_text("question,solution\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"question": ["q"], "answer": ["1"]}), tmp_path / "columns.parquet")
    cases = {
        str(tmp_path / "absent.jsonl"): "absent.jsonl' does not exist",
        str(tmp_path): "is a folder",
        str(tmp_path / "a.csv"): "unknown suffix '.csv'.* .jsonl or .parquet",
        str(tmp_path / "torn.parquet"): "torn.parquet' is no readable Parquet file",
        str(tmp_path / "columns.parquet"): r"columns \['answer', 'question'\]: it needs 'question' and 'solution', or",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / "out", good, source)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="input is empty"):
        prepare(tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_hub_without_its_package_names_the_install_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'megatron-rlt\[hub\]'"):
        prepare(tmp_path / "out", "hf://org/name")


def test_a_folder_without_a_data_set_is_refused_for_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prepared data set"):
        ensure_shards(tmp_path, tmp_path / "run")
