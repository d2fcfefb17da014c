"""Parts are there whole or not at all, and never meet those of another run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rlt.store.parts import COLUMNS_VERSION, PartStore
from megatron_rlt.whole_files import temporary_beside
from tests.disk.mounts import in_process

SCHEMA = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int64())), ("rank", pa.int64())])
IDENTITY = {"seed": 1, "model": "a"}


def rows(*names: str) -> list[dict[str, object]]:
    return [{"id": name, "ids": [len(name), 2], "rank": None} for name in names]


def store(folder: Path, identity: Mapping[str, object] = IDENTITY) -> PartStore:
    return PartStore(folder / "parts", SCHEMA, identity, output=folder / "all.parquet", key="output_dir")


def test_a_run_goes_on_after_the_last_whole_part_and_joins_all_in_order(tmp_path: Path) -> None:
    parts = store(tmp_path)
    assert not parts.is_finished()
    assert parts.begin() == 0
    parts.write(0, rows("x", "yy"))
    parts.write(1, rows("zzz"))
    parts.write(2, rows("w"))
    # A kill leaves a temporary file; a disk may lose a part's end. Whatever follows a damaged part is done again.
    (tmp_path / "parts" / ".part-000003.parquet.tmp").write_bytes(b"PAR1")
    parts.part(1).write_bytes(parts.part(1).read_bytes()[:-5])

    again = store(tmp_path)
    assert not again.is_finished()
    assert again.begin() == 1
    again.write(1, rows("zzz"))
    assert again.begin() == 3
    assert again.read(0, ("id",)) == [{"id": "x"}, {"id": "yy"}]
    again.join(3, {"rank": [3, None, 1, 2]})

    joined = [row | {"rank": rank} for row, rank in zip(rows("x", "yy", "zzz", "w"), (3, None, 1, 2), strict=True)]
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == joined
    assert store(tmp_path).is_finished()
    again.remove()
    again.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.parquet"]


def test_parts_count_up_to_the_first_gap_or_damage(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.begin()
    for number in range(4):
        parts.write(number, rows("x"))
    parts.part(3).write_bytes(b"PAR1")
    assert parts.begin() == 3
    parts.part(1).unlink()
    assert parts.begin() == 1


def test_rows_of_another_run_are_refused_by_what_differs(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.begin()
    parts.write(0, rows("x"))
    with pytest.raises(
        ValueError, match=r"parts holds rows of another run: seed was 1, now 2\. Nothing is overwritten"
    ):
        store(tmp_path, IDENTITY | {"seed": 2}).is_finished()
    parts.join(1, {})
    parts.remove()
    with pytest.raises(
        ValueError, match=r"output_dir: .*all\.parquet holds rows of another run: model was 'a', now 'b'"
    ):
        store(tmp_path, IDENTITY | {"model": "b"}).is_finished()


def test_values_that_json_cannot_tell_apart_are_the_same_identity(tmp_path: Path) -> None:
    store(tmp_path, {"sizes": (1, 2), "alpha": 0.1, "none": None}).begin()
    assert not store(tmp_path, {"sizes": [1, 2], "alpha": 0.1, "none": None}).is_finished()
    with pytest.raises(ValueError, match=r"another run: alpha was 0\.1, now 0\.2; none was None, now 3\. "):
        store(tmp_path, {"sizes": [1, 2], "alpha": 0.2, "none": 3}).is_finished()


def test_a_file_or_parts_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".identity.json.tmp").write_text("{")  # what a kill at the beginning leaves
    assert not store(tmp_path).is_finished()
    (tmp_path / "all.parquet").write_text("something")
    with pytest.raises(ValueError, match=r"all\.parquet exists and was not written by this command"):
        store(tmp_path).is_finished()
    (tmp_path / "parts" / "mine.txt").write_text("something")
    with pytest.raises(ValueError, match="parts exists and was not written by this command"):
        store(tmp_path).is_finished()


def test_parts_and_files_of_an_earlier_version_are_refused_as_such(tmp_path: Path) -> None:
    """Which held an identity without a version of the columns, that of `score` under another name."""
    now = IDENTITY | {COLUMNS_VERSION: 2}
    earlier = pa.schema([("id", pa.string())], {b"megatron_rlt.score": json.dumps(IDENTITY)})
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])], schema=earlier), tmp_path / "all.parquet")
    with pytest.raises(
        ValueError, match=r"all\.parquet was written by another version of megatron_rlt, with other col"
    ):
        store(tmp_path, now).is_finished()
    store(tmp_path).begin()
    with pytest.raises(ValueError, match="parts was written by another version of megatron_rlt, with other columns"):
        store(tmp_path, now).is_finished()


@pytest.mark.parametrize("named", [True, False])
def test_a_start_that_was_killed_before_its_folder_had_an_identity_goes_on(tmp_path: Path, named: bool) -> None:
    """The folder under its name without its identity, as earlier versions could leave it, and without its name."""
    if named:
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / ".identity.json.tmp").write_text("{")
    else:
        temporary_beside(tmp_path / "parts").mkdir()
    parts = store(tmp_path)
    assert not parts.is_finished()
    assert parts.begin() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]
    assert not store(tmp_path).is_finished()


def test_the_folder_has_its_identity_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any rename on the way, the next start finds either no folder or one that is its own."""
    seen = []
    rename, replace = Path.rename, Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.append((tmp_path / "parts").exists())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look)
    monkeypatch.setattr(Path, "replace", lambda path, target: (look(path, target), target)[1])
    store(tmp_path).begin()
    monkeypatch.setattr(Path, "replace", replace)
    assert seen == [False, False], "of the identity, then of the folder"
    assert (tmp_path / "parts" / "identity.json").is_file()


def test_a_removal_that_was_killed_does_not_block_the_finished_output(tmp_path: Path) -> None:
    parts = store(tmp_path)
    parts.begin()
    for number in range(20):
        parts.write(number, rows("x"))
    parts.join(20, {})
    answer = in_process(_killed_while_removing, tmp_path)
    assert answer == "killed"
    again = store(tmp_path)
    assert again.is_finished()
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]


def _killed_while_removing(folder: Path) -> str:
    class Killed(BaseException):
        pass

    unlink, count = os.unlink, [0]

    def fifth_kills(*args: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] == 5:
            raise Killed
        unlink(*args, **options)

    os.unlink = fifth_kills
    try:
        store(folder).remove()
    except Killed:
        return "killed"
    return "removed"
