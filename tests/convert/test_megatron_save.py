"""Folders that Megatron's own `save` wrote on several ranks become the model they came from, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.convert.conversions import converted, megatron_arguments, save_as_megatron
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

_PLAIN = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_APART = {"singleton_local_shards": True}  # one tensor per layer, gate and up rows apart: newer Megatron-LM


@pytest.mark.parametrize(
    ("family", "content", "arguments"),
    [
        ("llama", _PLAIN, {}),
        ("qwen2", _PLAIN, {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}),
        ("qwen3", _APART, {"qk_layernorm": True}),
    ],
)
def test_tp2_pp2_of_megatrons_own_save_is_read(
    tmp_path: Path, family: str, content: dict[str, bool], arguments: dict[str, bool], capfd: pytest.CaptureFixture[str]
) -> None:
    tied = not arguments.get("untie_embeddings_and_output_weights", True)
    hf = tiny_hf_model(tmp_path / "hf", family, tied=tied)
    layout = {"tp": 2, "pp": 2}
    run_ranks(save_as_megatron, 4, str(hf), str(tmp_path / "mlm"), layout, megatron_arguments(**arguments), content)
    back = converted(tmp_path / "mlm", tmp_path / "back")
    # The arguments know only the padded vocabulary: its last row is Megatron's padding.
    stored, expected = folder_tensors(back), folder_tensors(hf)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in stored:
            assert stored[name].shape[0] == 132
            stored[name] = stored[name][:131].clone()
    assert_bit_equal(stored, expected)
    config = json.loads((back / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"], config["tie_word_embeddings"]) == (132, 4, tied)
    # With the model's own configuration the padding goes, and the two folders are equal.
    exact = converted(tmp_path / "mlm", tmp_path / "exact", "--config", str(hf))
    assert_bit_equal(folder_tensors(exact), expected)
    assert json.loads((exact / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
