"""Killed before every single operation on files, everything that is written goes on, and ends as if undisturbed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.folders import check_files, find_resumable
from megatron_rlt.folder_lock import locked_folder
from megatron_rlt.models.weights.hf_writer import write_folder
from megatron_rlt.parallel.platform import group_of_a_thread, start_distributed, stop_distributed
from megatron_rlt.whole_files import discard, sweep
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.data.sources import numbered_rows, prepare, write_lines
from tests.disk.kills import kills
from tests.ranks import _free_port, run_ranks
from tests.store.test_parts import rows, store
from tests.tiny_models import tiny_hf_model


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[int], Path]:
    return lambda number: tmp_path / f"kill-{number}"


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _parts(folder: Path) -> None:
    """What `score`, `collect` and `evaluate` do with parts, from the first to the removal."""
    parts = store(folder)
    if not parts.is_finished():
        done = parts.begin()
        for number in range(done, 3):
            parts.write(number, rows(f"row {number}"))
        parts.join(3, {})
    parts.remove()


def test_parts(tmp_path: Path, folders: Callable[[int], Path]) -> None:
    num_kills = 0
    for folder in kills(_parts, folders):
        num_kills += 1
        _parts(folder)
        assert [row["id"] for row in pq.read_table(folder / "all.parquet").to_pylist()] == ["row 0", "row 1", "row 2"]
        assert store(folder).is_finished()
        sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["all.parquet"]
    assert num_kills > 15


def _prepare(folder: Path, source: Path) -> None:
    prepare(folder / "shards", source, rows_per_shard=4)


def test_prepare(tmp_path: Path, folders: Callable[[int], Path]) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(10))
    (tmp_path / "whole").mkdir()
    _prepare(tmp_path / "whole", source)
    whole = _hashes(tmp_path / "whole")
    for folder in kills(_prepare, folders, source, step=4):
        _prepare(folder, source)
        assert _hashes(folder) == whole


def _export(folder: Path, source: Path) -> None:
    """A run that ends, is prolonged, and ends again: its export is written, removed and written."""
    for number in (1, 2):
        if (folder / "hf").exists():
            discard(folder / "hf")
        tensors = [(f"layer.{index}", torch.full((8, 8), float(number))) for index in range(4)]
        write_folder(iter(tensors), source, folder / "hf", max_shard_bytes=600)


def test_an_export(tmp_path: Path, folders: Callable[[int], Path]) -> None:
    """At no moment is there a folder `hf` that lacks a file: whoever finds it takes it for the final weights."""
    source = tiny_hf_model(tmp_path / "source", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2)
    (tmp_path / "whole").mkdir()
    _export(tmp_path / "whole", source)
    names = set(_hashes(tmp_path / "whole" / "hf"))
    assert len(names) == 5
    for folder in kills(_export, folders, source, step=3):
        if (folder / "hf").exists():
            assert set(_hashes(folder / "hf")) == names
        _export(folder, source)
        with locked_folder(folder):
            sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["hf"]
        assert _hashes(folder / "hf") == _hashes(tmp_path / "whole" / "hf")


def _train(folder: Path, model: Path) -> None:
    """Three steps, one checkpoint kept: saves, and removals of the checkpoint before."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    start_distributed(timeout_seconds=60)
    _go_on(folder, model)
    stop_distributed()


def _go_on(folder: Path, model: Path) -> list[float]:
    training = tiny_training(model, layout_of(1, 1, 1))
    info = find_resumable(folder / "checkpoints", group=None)
    if info is not None:
        training.load(info)
    while training.num_updates < 3:
        training.update()
        training.save(folder / "checkpoints", keep_last=1)
    return [float(bits.double().sum()) for bits in training.state_bits()]


def _train_on(folder: Path, model: Path) -> None:
    """As `_train`, each save written by a thread during the next step."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    start_distributed(timeout_seconds=60)
    training, write = tiny_training(model, layout_of(1, 1, 1)), None
    group = group_of_a_thread(timeout_seconds=60)
    while training.num_updates < 3:
        training.update()
        if write is not None:
            write.result()
        captured = training.capture(copy=True, reshardable="tp_pp")
        write = BackgroundWrite(captured, folder / "checkpoints", keep_last=1, group=group)
    assert write is not None
    write.result()
    stop_distributed()


def test_checkpoints_written_while_training_goes_on(tmp_path: Path, folders: Callable[[int], Path]) -> None:
    """At every moment there is a whole checkpoint, or none yet; the next start goes on, and ends as if undisturbed."""
    model = tiny_hf_model(
        tmp_path / "hf", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2
    )
    (whole,) = run_ranks(_go_on, 1, tmp_path / "whole", model)
    found = []
    for folder in kills(_train_on, folders, model, step=25):
        found.append([check_files(path, None)[1] for path in (folder / "checkpoints").glob("step-*")])
        (again,) = run_ranks(_go_on, 1, folder, model)
        assert again == whole
    assert {len(faults) for faults in found} >= {0, 1}
    assert all(fault is None for faults in found for fault in faults)


def test_checkpoints(tmp_path: Path, folders: Callable[[int], Path]) -> None:
    model = tiny_hf_model(
        tmp_path / "hf", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2
    )
    (whole,) = run_ranks(_go_on, 1, tmp_path / "whole", model)
    for folder in kills(_train, folders, model, step=18):
        (again,) = run_ranks(_go_on, 1, folder, model)
        assert again == whole
        sweep(folder)
        # A kill between the last save and the removal leaves the checkpoint before: whole, and one more than is kept.
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names in (["step-000003"], ["step-000002", "step-000003"])
        for path in (folder / "checkpoints").iterdir():
            assert check_files(path, None)[1] is None
