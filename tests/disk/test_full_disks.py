"""Everything that is written, on real disks that are full at different points: one line, and nothing is left of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.folders import find_resumable, list_checkpoints
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.data.check import check_data_set
from megatron_rlt.disk_faults import DiskError
from megatron_rlt.metrics.writer import JsonLines
from megatron_rlt.models.weights.hf_writer import write_folder
from megatron_rlt.parallel.platform import group_of_a_thread
from megatron_rlt.store.run_folder import write_run_folder
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.data.sources import numbered_rows, numbered_shards, prepare, write_lines
from tests.disk.mounts import small_disk
from tests.ranks import run_ranks
from tests.store.test_parts import rows, store
from tests.tiny_models import tiny_hf_model
from tools.chaos.disks import PAGE, resize, used_bytes

ROOMY = 64 * 2**20
FULL = os.strerror(errno.ENOSPC)


def _refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except DiskError as error:
        return str(error)
    return "nothing was refused"


def _save_twice(model: Path, folder: Path, background: bool = False) -> dict[str, Any]:
    """A save on a disk that is too small, and the same save when there is space."""
    training = tiny_training(model, layout_of(1, 1, 1))
    training.update()

    def save() -> None:
        if not background:
            training.save(folder / "checkpoints")
            return
        group, captured = group_of_a_thread(timeout_seconds=60), training.capture(copy=True)
        BackgroundWrite(captured, folder / "checkpoints", keep_last=1, group=group).result()

    seen: dict[str, Any] = {"refused": _refusal(save)}
    dist.barrier()
    seen["left"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        resize(folder, ROOMY)
    dist.barrier()
    save()
    seen["found"] = find_resumable(folder / "checkpoints", group=dist.group.WORLD)
    return seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "hf"
    return tiny_hf_model(folder, "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2)


@pytest.fixture(scope="module")
def checkpoint_bytes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(_save, 1, model, folder)
    return used_bytes(folder)


@pytest.mark.parametrize("fits", ["models", "optimizer/common.pt"])
def test_a_disk_that_is_full_for_one_rank_alone(model: Path, tmp_path: Path, fits: str) -> None:
    """Exactly what is written first fits: of the rest, the common state and the papers are the first rank's alone."""
    run_ranks(_save, 2, model, tmp_path / "whole")
    whole = tmp_path / "whole" / "step-000001"
    size = used_bytes(whole / "models") + (PAGE if fits != "models" else 0)
    with small_disk(tmp_path / "disk", size) as disk:
        for seen in run_ranks(_save_twice, 2, model, disk):
            assert str(disk / "checkpoints") in seen["refused"]
            assert "bytes are free there" in seen["refused"]
            assert seen["left"] == []
            assert seen["found"].step == 1


def _save(model: Path, folder: Path) -> None:
    training = tiny_training(model, layout_of(1, 1, 1))
    training.update()
    training.save(folder)


_SHARES = (0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.98, 1.0)


@pytest.mark.parametrize(
    ("share", "world_size", "background"),
    [
        *((share, world_size, False) for share in _SHARES for world_size in (1, 2)),
        *((0.1, 1, True), (0.0, 2, True), (0.3, 2, True), (0.98, 2, True)),
    ],
)
def test_a_checkpoint_on_a_full_disk(
    model: Path, checkpoint_bytes: int, tmp_path: Path, share: float, world_size: int, background: bool
) -> None:
    """At each share another file does not fit: common state, tensors, metadata, rank state, manifest."""
    size = max(PAGE, int(share * checkpoint_bytes) // PAGE * PAGE - PAGE)
    with small_disk(tmp_path / "disk", size) as disk:
        for seen in run_ranks(_save_twice, world_size, model, disk, background):
            assert str(disk / "checkpoints") in seen["refused"]
            assert "bytes are free there" in seen["refused"]
            assert "\n" not in seen["refused"]
            assert seen["left"] == []
            assert seen["found"].step == 1


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_an_export_on_a_full_disk(tmp_path: Path, model: Path, share: float) -> None:
    tensors = [(f"layer.{number}", torch.ones(64, 64)) for number in range(8)]
    write_folder(iter(tensors), model, tmp_path / "whole", max_shard_bytes=50_000)
    with small_disk(tmp_path / "disk", int(share * used_bytes(tmp_path / "whole")) // PAGE * PAGE) as disk:
        refused = _refusal(lambda: write_folder(iter(tensors), model, disk / "hf", max_shard_bytes=50_000))
        assert refused.startswith(f"{disk}"), refused
        assert f"{FULL} (" in refused
        assert list(disk.iterdir()) == []
        resize(disk, ROOMY)
        write_folder(iter(tensors), model, disk / "hf", max_shard_bytes=50_000)
        assert [path.name for path in disk.iterdir()] == ["hf"]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8, 0.95])
def test_prepare_on_a_full_disk(tmp_path: Path, share: float) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(400))
    prepare(tmp_path / "whole", source, rows_per_shard=100)
    with small_disk(tmp_path / "disk", int(share * used_bytes(tmp_path / "whole")) // PAGE * PAGE) as disk:
        refused = _refusal(lambda: prepare(disk / "shards", source, rows_per_shard=100))
        assert f"{FULL} (" in refused
        assert str(disk / "shards") in refused
        assert list(disk.iterdir()) == []
        resize(disk, ROOMY)
        assert prepare(disk / "shards", source, rows_per_shard=100).manifest.num_rows == 400


def test_an_index_that_cannot_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of shards writes into the folder of temporary files."""
    shards = numbered_shards(tmp_path, 30)
    with small_disk(tmp_path / "disk", 2 * PAGE) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        refused = _refusal(lambda: check_data_set(shards))
        assert refused.startswith(str(disk))
        assert f" cannot be written: {FULL} (" in refused
        assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_before_the_first_part(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", PAGE) as disk:
        (disk / "filler").write_bytes(bytes(PAGE))
        assert _refusal(store(disk).begin).startswith(f"{disk}/.parts.")
        assert [path.name for path in disk.iterdir()] == ["filler"]


def test_parts_metrics_and_papers_on_a_full_disk(tmp_path: Path) -> None:
    config = SftConfig.model_validate({"output_dir": "a", "model": {"model": "m"}, "data": {"path": "d"}})
    with small_disk(tmp_path / "disk", 16 * PAGE) as disk:
        parts, lines = store(disk), JsonLines(disk / "metrics.jsonl", resumed_step=0)
        parts.begin()
        parts.write(0, rows("x"))
        lines.log(1, {"a": 1.0})
        filler = disk / "filler"
        with filler.open("wb") as file:
            while True:
                try:
                    os.write(file.fileno(), bytes(PAGE))
                except OSError:
                    break
        refused = {
            "parts/part-000001.parquet": _refusal(lambda: parts.write(1, rows("x"))),
            "metrics.jsonl": _refusal(lambda: [lines.log(2, {"a": 1.0}) for _ in range(1000)]),
            "run.json": _refusal(lambda: write_run_folder(disk, "sft", config, world_size=1)),
            "all.parquet": _refusal(lambda: parts.join(1, {})),
        }
        for name, line in refused.items():
            assert line.startswith(f"{disk / name} cannot be written: {FULL} ("), line
        found = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
        assert found == ["filler", "metrics.jsonl", "parts/identity.json", "parts/part-000000.parquet"]
        filler.unlink()
        assert store(disk).begin() == 1
        assert [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()[:1]] == [1]


def test_a_checkpoint_that_is_removed_on_a_full_disk_leaves_the_new_one(
    model: Path, checkpoint_bytes: int, tmp_path: Path
) -> None:
    """Space for one and a half checkpoints: the second is refused and the first stays."""
    with small_disk(tmp_path / "disk", int(1.5 * checkpoint_bytes) // PAGE * PAGE) as disk:
        (kept,) = run_ranks(_save_two, 1, model, disk / "checkpoints")
        assert "bytes are free there" in kept
        assert [path.name for path in list_checkpoints(disk / "checkpoints")] == ["step-000001"]
        assert shutil.disk_usage(disk).free >= 0.4 * checkpoint_bytes


def _save_two(model: Path, folder: Path) -> str:
    training = tiny_training(model, layout_of(1, 1, 1))
    training.update()
    training.save(folder, keep_last=1)
    training.update()
    return _refusal(lambda: training.save(folder, keep_last=1))
