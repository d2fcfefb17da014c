"""A folder of an export's name is complete, or not there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rlt.config.weight_files import INDEX_FILE
from megatron_rlt.models.weights.hf_writer import check_folders, write_folder
from tests.models.loading import assert_bit_equal, folder_tensors

_TENSORS = {
    name: torch.full((4, 4), number, dtype=torch.bfloat16) for number, name in enumerate("abc")
}  # 32 bytes each


def _source(root: Path, config: dict[str, object]) -> Path:
    (root / "source").mkdir()
    (root / "source" / "config.json").write_text(json.dumps(config))
    return root / "source"


def _broken_off() -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(_TENSORS.items())[:2]
    raise OSError("no space left on device")


def test_an_export_that_breaks_off_leaves_no_folder_and_does_not_disturb_the_next(tmp_path: Path) -> None:
    source, target = _source(tmp_path, {}), tmp_path / "run" / "hf"
    with pytest.raises(OSError, match="no space left"):
        write_folder(_broken_off(), source, target, max_shard_bytes=32)
    assert not target.exists()
    assert check_folders(source, target) is None
    write_folder(iter(_TENSORS.items()), source, target, max_shard_bytes=32)
    assert_bit_equal(folder_tensors(target), _TENSORS)
    assert [path.name for path in target.parent.iterdir()] == ["hf"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_have_the_mode_of_the_files_beside_them(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_folder(iter(_TENSORS.items()), _source(tmp_path, {}), tmp_path / "hf", max_shard_bytes=32)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 5  # three shards, index, configuration
    assert set(modes.values()) == {mode}


@pytest.mark.parametrize(
    ("max_shard_bytes", "files"),
    [
        (31, {"a": 1, "b": 2, "c": 3}),  # each tensor is larger than a shard may be: a file of its own
        (64, {"a": 1, "b": 1, "c": 2}),  # exactly two fit
    ],
)
def test_shards_fill_in_order_up_to_their_size(tmp_path: Path, max_shard_bytes: int, files: dict[str, int]) -> None:
    target = tmp_path / "hf"
    write_folder(iter(_TENSORS.items()), _source(tmp_path, {}), target, max_shard_bytes=max_shard_bytes)
    index = json.loads((target / INDEX_FILE).read_text())
    total = max(files.values())
    assert index["weight_map"] == {
        name: f"model-{number:05d}-of-{total:05d}.safetensors" for name, number in files.items()
    }
    assert index["metadata"] == {"total_size": 96}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"torch_dtype": "float32", "x": 1}, {"torch_dtype": "bfloat16", "x": 1}),  # transformers 4
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),  # transformers 5
        ({"x": 1}, {"x": 1, "torch_dtype": "bfloat16"}),  # both versions read the older key
    ],
)
def test_config_names_the_dtype_of_the_weights(
    tmp_path: Path, before: dict[str, object], after: dict[str, object]
) -> None:
    target = tmp_path / "hf"
    write_folder(iter(_TENSORS.items()), _source(tmp_path, before), target, max_shard_bytes=2**20)
    assert json.loads((target / "config.json").read_text()) == after


def test_a_source_without_config_is_refused(tmp_path: Path) -> None:
    fault = check_folders(tmp_path, tmp_path / "hf")
    assert fault is not None
    assert "no config.json; the source of an export must be" in fault
