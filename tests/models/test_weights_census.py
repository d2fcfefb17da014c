"""A folder that does not fit its model is refused before a weight is read, in one error that names every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_rlt.models.weights.hf_reader import check_census, read_headers
from megatron_rlt.models.weights.table import hf_shapes
from tests.models.loading import folder_tensors
from tests.tiny_models import tiny_hf_model

_Tensors = dict[str, torch.Tensor]
_NORM, _QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def _check(folder: Path) -> None:
    architecture = Architecture.from_folder(folder)
    unused = ("lm_head.weight",) if architecture.tied_embeddings else ()
    check_census(folder, read_headers(folder), hf_shapes(architecture), unused=unused)


def _single(folder: Path, *, tied: bool = False) -> Path:
    return tiny_hf_model(folder, "qwen2", tied=tied, num_layers=2)


def _sharded(folder: Path) -> Path:
    return tiny_hf_model(folder, "qwen2", tied=False, num_layers=2, max_shard_size="60KB")


def _rewrite(folder: Path, change: Callable[[_Tensors], object]) -> None:
    tensors = folder_tensors(folder)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(_QUERY), f"missing tensors (1): {_QUERY}"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing tensors (1): lm_head.weight"),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
            "surplus tensors (1): model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}),
            "surplus tensors (1): model.layers.0.self_attn.o_proj.bias",
        ),
        (lambda tensors: tensors.update({_NORM: torch.ones(63)}), f"wrong shapes (1): {_NORM} is [63], not [64]"),
        (
            lambda tensors: tensors.update({_QUERY: torch.ones(64, 64, dtype=torch.float8_e4m3fn)}),
            f"dtypes other than F32, BF16, F16 (1): {_QUERY} is F8_E4M3",
        ),
    ],
)
def test_a_fault_of_the_weights_is_named(tmp_path: Path, change: Callable[[_Tensors], object], named: str) -> None:
    folder = _single(tmp_path)
    _check(folder)
    _rewrite(folder, change)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        _check(folder)
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert str(caught.value).count("(1)") == 1  # nothing else is accused


def test_all_faults_come_in_one_error_and_long_lists_are_cut(tmp_path: Path) -> None:
    folder = _single(tmp_path)
    prefix = "base_model."
    _rewrite(folder, lambda tensors: tensors.update({prefix + name: tensors.pop(name) for name in list(tensors)}))
    with pytest.raises(ValueError, match=r"missing tensors \(27\).* and 19 more.*surplus tensors \(27\)"):
        _check(folder)


def test_rotary_buffers_and_a_tied_output_layer_may_be_there(tmp_path: Path) -> None:
    folder = _single(tmp_path, tied=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": torch.ones(131, 64)}
    _rewrite(folder, lambda tensors: tensors.update(extra))
    _check(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = _single(tmp_path)
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; save the model with saf"):
        _check(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name}: damaged or cut short"):
        _check(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: named by {INDEX_FILE} but not there"):
        _check(folder)


def test_an_index_that_points_to_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][_NORM] = next(file for file in files if file != index["weight_map"][_NORM])
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"names tensors that their files do not hold: {_NORM}"):
        _check(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    folder = _sharded(tmp_path)
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(
        ValueError, match=f"{INDEX_FILE}: (not valid JSON|must hold one JSON object|holds no weight_map)"
    ):
        _check(folder)
