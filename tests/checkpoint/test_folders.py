"""A checkpoint is complete and intact, or it is refused by name; a failed save leaves none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlt.checkpoint.folders import all_or_none, find_resumable, list_checkpoints
from megatron_rlt.checkpoint.saving import write_training_state
from megatron_rlt.parallel.platform import world
from tests.checkpoint.sealing import reseal
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


def _message(action: Any) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _life(model: Path, folder: Path) -> dict[str, Any]:
    """Several saves of one training on one rank, and what each left behind."""
    seen: dict[str, Any] = {}
    training = tiny_training(model, layout_of(1, 1, 1))
    training.save(folder, num_updates=0)  # before any update: the moments do not exist yet
    seen["nothing trained"] = _message(lambda: training.save(folder, step=1, num_updates=1))
    seen["idle"] = _message(lambda: training.save(folder, step=2, num_updates=0))
    seen["leftover"] = [path.name for path in folder.glob(".step-*")]
    for _ in range(3):
        training.update()
        training.save(folder, step=training.num_updates + 2, keep_last=2)
    seen["kept"] = [path.name for path in list_checkpoints(folder)]
    seen["again"] = _message(lambda: training.save(folder, step=5))
    return seen


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("life")
    model = tiny_hf_model(folder / "hf", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=2)
    (seen,) = run_ranks(_life, 1, model, folder / "checkpoints")
    return folder / "checkpoints", seen


def test_updates_that_saved_the_same_bits_are_an_error(life: tuple[Path, dict[str, Any]]) -> None:
    assert life[1]["nothing trained"].startswith("RuntimeError: saved weights must change with training; step 1 would")


def test_without_updates_equal_bits_are_fine(life: tuple[Path, dict[str, Any]]) -> None:
    assert life[1]["idle"] == "nothing was raised"


def test_the_newest_are_kept_and_leftovers_swept(life: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = life
    assert seen["kept"] == ["step-000004", "step-000005"]
    assert seen["leftover"] == []  # the refused save of step 1 was swept by the save of step 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000005"]


def test_a_step_is_saved_once(life: tuple[Path, dict[str, Any]]) -> None:
    assert life[1]["again"].startswith("ValueError: a step is saved once; ")


def test_the_newest_intact_checkpoint_is_found(life: tuple[Path, dict[str, Any]]) -> None:
    info = find_resumable(life[0], group=None)
    assert info is not None
    assert (info.step, info.path.name, info.manifest.num_updates) == (5, "step-000005", 3)
    assert info.manifest.versions["torch"] == torch.__version__.split("+")[0] or "+" in info.manifest.versions["torch"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "absent", group=None) is None
    (tmp_path / ".step-000003.tmp").mkdir()
    (tmp_path / "step-final").mkdir()
    assert find_resumable(tmp_path, group=None) is None


def _largest(folder: Path) -> Path:
    return max((folder / "models").rglob("*.distcp"), key=lambda path: path.stat().st_size)


def _truncate(folder: Path) -> Path:
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def _flip_a_bit(folder: Path) -> Path:
    path = _largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path


def _remove(folder: Path) -> Path:
    path = folder / "optimizer" / ".metadata"
    path.unlink()
    return path


def _remove_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.unlink()
    return path


def _break_manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    return path


def _with_manifest(**changes: Any) -> Any:
    def damage(folder: Path) -> Path:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    return damage


def _resealed(**changes: Any) -> Any:
    """A manifest that states a fitting hash of itself."""

    def damage(folder: Path) -> Path:
        reseal(folder, **changes)
        return folder / "manifest.json"

    return damage


def _rename(folder: Path) -> Path:
    """An older checkpoint under the newest one's name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-000004"), folder)
    return folder / "manifest.json"


def _add_a_file(folder: Path) -> Path:
    path = folder / "models" / "policy" / "__9_0.distcp"
    path.write_bytes(b"x")
    return path


def _add_a_link(folder: Path) -> Path:
    path = folder / "more"
    path.symlink_to(folder.parent)
    return path


def _remove_all_but_the_manifest(folder: Path) -> Path:
    manifest = (folder / "manifest.json").read_text()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    reseal(folder)
    return folder / "manifest.json"


_DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (_truncate, "bytes instead of"),
    "one bit": (_flip_a_bit, "was altered"),
    "a file is gone": (_remove, "is missing"),
    "no manifest": (_remove_manifest, "is missing"),
    "half a manifest": (_break_manifest, "is not a checkpoint manifest"),
    "earlier version": (_with_manifest(format=1), "has format 1; this version reads format 2"),
    "later version": (_with_manifest(format=3), "has format 3; this version reads format 2"),
    "another number of updates": (_with_manifest(num_updates=4), "was altered: the SHA-256 of its content"),
    "text for a number": (_with_manifest(num_updates="3"), "is not a checkpoint manifest .num_updates: "),
    "a list for an object": (_with_manifest(layout=[1]), "is not a checkpoint manifest .layout: "),
    "an unknown key": (_with_manifest(more=1), "is not a checkpoint manifest .more: "),
    "no files": (_with_manifest(files={}), "was altered: the SHA-256 of its content"),
    "another step": (_resealed(step=6), "is the manifest of step-000006, not of a folder named step-000005"),
    "another folder's": (_rename, "is the manifest of step-000004, not of a folder named step-000005"),
    "a file more": (_add_a_file, "its manifest does not name it"),
    "a link more": (_add_a_link, "its manifest does not name it"),
    "nothing but the manifest": (_remove_all_but_the_manifest, "does not name models/policy/.metadata"),
    "a rank too few": (_resealed(layout={"tp": 2, "pp": 1, "dp": 1, "sp": False, "cp": 1}), "ranks/rank-00001.pt"),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_good_one_offered(
    life: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    damage, complaint = _DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(life[0], folder)
    path = damage(folder / "step-000005")
    with pytest.raises(ValueError, match=complaint) as caught:
        find_resumable(folder, group=None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"{folder / 'step-000004'} is intact: to resume from it, remove {folder / 'step-000005'}" in str(
        caught.value
    )
    _truncate(folder / "step-000004")
    with pytest.raises(ValueError, match="no earlier checkpoint is intact: to start from the beginning, remove"):
        find_resumable(folder, group=None)
    shutil.rmtree(folder / "step-000005")
    shutil.rmtree(folder / "step-000004")
    shutil.copytree(life[0] / "step-000004", folder / "step-000004")
    info = find_resumable(folder, group=None)
    assert info is not None
    assert info.step == 4


def _one_rank_fails(model: Path, folder: Path) -> dict[str, Any]:
    training = tiny_training(model, layout_of(1, 2, 1))
    captured = training.capture(step=1, num_updates=0)
    if dist.get_rank() == 1:
        captured = replace(captured, rank_state=None)
    seen: dict[str, Any] = {}
    try:
        write_training_state(captured, folder, keep_last=1, group=world())
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["found"] = find_resumable(folder, group=dist.group.WORLD)
    training.save(folder, step=2, num_updates=0)
    dist.barrier()
    if dist.get_rank() == 0:
        _flip_a_bit(folder / "step-000002")
    dist.barrier()
    seen["refused"] = _message(lambda: find_resumable(folder, group=dist.group.WORLD))
    seen["agreed"] = _message(_second_rank_raises)
    seen["files"] = sorted(path.name for path in folder.iterdir())
    return seen


def _second_rank_raises() -> None:
    with all_or_none("counting", world()):
        if dist.get_rank() == 1:
            raise ValueError("one is missing")


def test_a_rank_that_fails_to_write_leaves_no_checkpoint_and_stops_the_others(tmp_path: Path) -> None:
    model = tiny_hf_model(
        tmp_path / "hf", "qwen2", tied=False, num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=2
    )
    first, second = run_ranks(_one_rank_fails, 2, model, tmp_path / "checkpoints")
    assert first["error"].startswith("RuntimeError: writing ")
    assert "failed on rank 1: " in first["error"]
    assert "NoneType" in second["error"]
    assert first["found"] is None
    assert first["files"] == ["step-000002"]
    assert first["refused"] == second["refused"]
    assert "was altered" in first["refused"]
    assert first["agreed"] == "RuntimeError: counting failed on rank 1: ValueError: one is missing"
    assert second["agreed"] == "ValueError: one is missing"
