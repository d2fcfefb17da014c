"""Folders that Megatron's own `save` wrote on several ranks become the model they came from, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.convert.conversions import converted, megatron_arguments, save_as_megatron
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_PLAIN = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_APART = {"singleton_local_shards": True}  # one tensor per layer, gate and up rows apart: newer Megatron-LM
_CASES: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
    "llama": (_PLAIN, {}),
    "qwen2": (_PLAIN, {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}),
    "qwen3": (_APART, {"qk_layernorm": True}),
}


def _tied(family: str) -> bool:
    return not _CASES[family][1].get("untie_embeddings_and_output_weights", True)


def _save_all(root: Path) -> None:
    for family, (content, changes) in _CASES.items():
        folder, target = str(root / f"{family}-hf"), str(root / f"{family}-mlm")
        save_as_megatron(folder, target, {"tp": 2, "pp": 2}, megatron_arguments(**changes), content)
    dist.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`FAMILY-hf`, and `FAMILY-mlm` that Megatron saved from it in TP2 x PP2."""
    root = tmp_path_factory.mktemp("saved")
    for family in _CASES:
        tiny_hf_model(root / f"{family}-hf", family, tied=_tied(family))
    run_ranks(_save_all, 4, root)
    return root


@pytest.mark.parametrize("family", _CASES)
def test_tp2_pp2_of_megatrons_own_save_is_read(tmp_path: Path, saved: Path, family: str) -> None:
    hf, folder = saved / f"{family}-hf", saved / f"{family}-mlm"
    back = converted(folder, tmp_path / "back")
    # The arguments know only the padded vocabulary: its last row is Megatron's padding.
    stored, expected = folder_tensors(back), folder_tensors(hf)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in stored:
            assert stored[name].shape[0] == 132
            stored[name] = stored[name][:131].clone()
    assert_bit_equal(stored, expected)
    config = json.loads((back / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"], config["tie_word_embeddings"]) == (132, 4, _tied(family))
    # With the model's own configuration the padding goes, and the two folders are equal.
    exact = converted(folder, tmp_path / "exact", "--config", str(hf))
    assert_bit_equal(folder_tensors(exact), expected)
    assert json.loads((exact / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
