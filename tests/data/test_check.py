"""Damaged shards are not trained on; a killed `prepare` runs again; two at once do not meet."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.data.check import check_data_set
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.folder_lock import LockedError, locked_beside
from tests.data.sources import numbered_rows, numbered_shards, prepare, write_lines
from tests.ranks import forkserver


@pytest.mark.parametrize("position", [600, -2000])
def test_one_altered_bit_of_a_shard_is_found_at_the_start(tmp_path: Path, position: int) -> None:
    """In a row's text, and in the padding behind the last row."""
    folder = numbered_shards(tmp_path, 12)
    shard = folder / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="was altered since it was prepared") as caught:
        ensure_shards(folder, tmp_path / "work")
    assert str(shard) in str(caught.value)
    assert "prepare the data set again" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="was altered since it was prepared"):
        prepare(folder, tmp_path / "rows.jsonl", rows_per_shard=10)


def test_shards_inside_a_run_folder_are_compared_too(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(12))
    folder = ensure_shards(source, tmp_path / "data")
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"3 + 1?", b"3 + 2?"))
    with pytest.raises(ValueError, match="was altered since it was prepared"):
        ensure_shards(source, tmp_path / "data")


def _other_name(manifest: dict[str, Any]) -> None:
    manifest["shards"][1]["name"] = "../../shard-000001.tar"


def _other_order(manifest: dict[str, Any]) -> None:
    manifest["shards"].reverse()


def _other_count(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["num_rows"] = 9


def _other_content(manifest: dict[str, Any]) -> None:
    manifest["content_hash"] = "0" * 64


def _text_for_a_number(manifest: dict[str, Any]) -> None:
    manifest["num_rows"] = "12"


@pytest.mark.parametrize("change", [_other_name, _other_order, _other_count, _other_content, _text_for_a_number])
def test_a_manifest_that_contradicts_itself_is_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = numbered_shards(tmp_path, 12)
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is no manifest of a prepared data set") as caught:
        check_data_set(folder)
    assert "\n" not in str(caught.value)


def _prepare_and_die(source: Path, target: Path, after: int) -> None:
    """SIGKILL when so many files were closed: in the midst of shards and index."""
    from megatron_rlt.data import shards

    write, count = shards._write_tar, [0]

    def dying(*args: Any, **options: Any) -> None:
        write(*args, **options)
        count[0] += 1
        if count[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    shards._write_tar = dying
    prepare(target, source, rows_per_shard=2)


def test_a_killed_prepare_runs_again_and_its_leftovers_go(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(12))
    target = tmp_path / "out" / "shards"
    for after in (1, 3, 6):
        process = forkserver().Process(target=_prepare_and_die, args=(source, target, after))
        process.start()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        left = [path.name for path in target.parent.iterdir() if path.name.endswith(".tmp")]
        assert len(left) == 1, "each start sweeps what the one before left"
    assert not prepare(target, source, rows_per_shard=2).reused
    assert [path.name for path in target.parent.iterdir()] == ["shards"]
    assert prepare(target, source, rows_per_shard=2).reused


def test_two_prepares_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(12))
    with locked_beside(tmp_path / "shards"):
        process = forkserver().Process(target=_prepare_quietly, args=(tmp_path / "shards", source))
        process.start()
        process.join(timeout=60)
    assert process.exitcode == 7
    assert not (tmp_path / "shards").exists()
    assert not prepare(tmp_path / "shards", source).reused


def _prepare_quietly(target: Path, source: Path) -> None:
    try:
        prepare(target, source)
    except LockedError as error:
        os._exit(7 if f"{target} is being written by another start (host " in str(error) else 8)
