"""Parts are there whole or not at all, and never meet those of another run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.store.parts import PartStore, holds_rows_of

SCHEMA = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int64()))])
IDENTITY = {"seed": 1, "model": "a"}


def rows(*names: str) -> list[dict[str, object]]:
    return [{"id": name, "ids": [len(name), 2]} for name in names]


def store(folder: Path, **changes: object) -> PartStore:
    return PartStore(folder / "parts", SCHEMA, IDENTITY | changes)


def test_a_run_goes_on_after_the_last_whole_part_and_joins_all_in_order(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.check()
    assert parts.begin() == 0
    parts.write(0, rows("x", "yy"))
    parts.write(1, rows("zzz"))
    parts.write(2, rows("w"))
    # A kill leaves a temporary file; a disk may lose a part's end. Whatever follows a damaged part is done again.
    (tmp_path / "parts" / ".part-000003.parquet.tmp").write_bytes(b"PAR1")
    parts.part(1).write_bytes(parts.part(1).read_bytes()[:-5])

    again = store(tmp_path)
    again.check()
    assert again.begin() == 1
    again.write(1, rows("zzz"))
    assert again.begin() == 3
    again.join(tmp_path / "all.parquet", 3)

    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == rows("x", "yy", "zzz", "w")
    assert holds_rows_of(tmp_path / "all.parquet", IDENTITY)
    again.remove()
    again.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.parquet"]


def test_rows_of_another_run_are_refused_by_what_differs(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.begin()
    parts.write(0, rows("x"))
    parts.join(tmp_path / "all.parquet", 1)
    with pytest.raises(ValueError, match="parts holds rows of another run: seed was 1, now 2"):
        store(tmp_path, seed=2).check()
    with pytest.raises(ValueError, match=r"all\.parquet holds rows of another run: model was 'a', now 'b'"):
        holds_rows_of(tmp_path / "all.parquet", IDENTITY | {"model": "b"})


def test_a_file_or_parts_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    assert not holds_rows_of(tmp_path / "all.parquet", IDENTITY)
    (tmp_path / "all.parquet").write_text("something")
    with pytest.raises(ValueError, match=r"all\.parquet exists and was not written by this command"):
        holds_rows_of(tmp_path / "all.parquet", IDENTITY)
    (tmp_path / "parts").mkdir()
    store(tmp_path).check()
    (tmp_path / "parts" / "part-000000.parquet").write_text("something")
    with pytest.raises(ValueError, match="parts exists and was not written by this command"):
        store(tmp_path).check()
