"""A checkpoint that a thread writes while training goes on holds the bits of its step boundary, or none is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlt.checkpoint import saving
from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.folders import find_resumable, list_checkpoints
from megatron_rlt.checkpoint.manifest import FileRecord
from megatron_rlt.config.training import Reshardable
from megatron_rlt.parallel.platform import group_of_a_thread
from tests.checkpoint.tiny_training import layout_of, tiny_training
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

Sizes = tuple[int, int, int]  # tp, pp, cp


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny_hf_model(folder / "hf", "qwen2", tied=False, num_layers=2)


def _files(folder: Path) -> dict[str, FileRecord]:
    """Recorded sizes and hashes; `.metadata` names its folder and a random id."""
    info = find_resumable(folder, group=None)
    assert info is not None
    return {name: record for name, record in info.manifest.files.items() if not name.endswith(".metadata")}


def _both_ways(model: Path, folder: Path, sizes: Sizes, reshardable: Reshardable) -> dict[str, Any]:
    """The same state, written at once and by threads that begin only after another update; then training goes on."""
    training, group = tiny_training(model, layout_of(*sizes)), group_of_a_thread(timeout_seconds=60)
    for _ in range(2):
        training.update()
    training.save(folder / "foreground", reshardable=reshardable)
    captured = training.capture(reshardable=reshardable, copy=True)
    training.update()
    write = BackgroundWrite(captured, folder / "background", keep_last=1, group=group)
    for _ in range(3):
        training.update()
    info, seconds = write.result()
    dist.barrier()
    again = tiny_training(model, layout_of(*sizes))
    again.load(info)
    for _ in range(4):
        again.update()
    bits = zip(training.state_bits(), again.state_bits(), strict=True)
    return {
        "foreground": _files(folder / "foreground"),
        "background": _files(folder / "background"),
        "seconds": seconds,
        "resumed": all(bool((old == new).all()) for old, new in bits),
    }


@pytest.mark.parametrize(
    ("sizes", "reshardable"),
    [((1, 1, 1), "full"), ((2, 1, 1), "tp_pp"), ((1, 2, 1), "full"), ((1, 1, 1), "tp_pp")],
    ids=["dp2-full", "tp2-tp_pp", "pp2-full", "dp2-tp_pp"],
)
def test_files_are_those_of_a_save_in_the_foreground(
    model: Path, tmp_path: Path, sizes: Sizes, reshardable: Reshardable
) -> None:
    for seen in run_ranks(_both_ways, 2, model, tmp_path, sizes, reshardable):
        assert len(seen["background"]) > 8
        assert seen["background"] == seen["foreground"]
        assert seen["resumed"]
        assert seen["seconds"] > 0


def _fails_on_one_rank(model: Path, folder: Path) -> dict[str, Any]:
    """The second rank's file is in the way: its thread fails, and so does the first rank's."""
    training, group = tiny_training(model, layout_of(1, 1, 1)), group_of_a_thread(timeout_seconds=60)
    training.update()
    training.save(folder)
    training.update()
    if dist.get_rank() == 1:
        hashed = saving.hash_files

        def refuse(*_: Any) -> Any:
            saving.hash_files = hashed
            raise PermissionError(13, "Permission denied", str(folder / "file"))

        saving.hash_files = refuse
    write = BackgroundWrite(training.capture(copy=True), folder, keep_last=1, group=group)
    training.update()
    error = write.error()
    dist.barrier()  # the first rank has removed what was written
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    write = BackgroundWrite(training.capture(copy=True), folder, keep_last=1, group=group)
    info, _ = write.result()
    dist.barrier()
    return {"error": f"{type(error).__name__}: {error}", "left": left, "next": info.step}


def test_a_failure_on_one_rank_fails_on_all_and_leaves_the_checkpoint_before(model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_fails_on_one_rank, 2, model, tmp_path / "checkpoints")
    assert first["error"].startswith("DiskError: reading back ")
    assert "failed on rank 1: " in first["error"]
    assert "cannot be written: Permission denied" in second["error"]
    for seen in (first, second):
        assert (seen["left"], seen["next"]) == (["step-000001"], 3)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000003"]
