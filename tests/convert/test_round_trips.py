"""Every kind becomes every other kind and comes back without changing a bit, tensors and config.json."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.conversions import converted
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.tiny_models import LLAMA3_SCALING, tiny_hf_model

_KINDS = ("hf", "megatron", "nemo", "bridge")
_FREE_LLAMA3 = LLAMA3_SCALING | {"original_max_position_embeddings": 128}


def _assert_same(left: Path, right: Path) -> None:
    assert_bit_equal(folder_tensors(left), folder_tensors(right))
    assert json.loads((left / "config.json").read_text()) == json.loads((right / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "rope"),
    [
        ("llama", False, torch.float32, None),
        ("llama", True, torch.bfloat16, LLAMA3_SCALING),
        ("qwen2", True, torch.bfloat16, None),
        ("qwen3", False, torch.float32, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_hugging_face_to_each_kind_and_each_kind_to_each(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype, rope: dict[str, Any] | None
) -> None:
    hf = tiny_hf_model(tmp_path / "hf", family, tied=tied, num_layers=2, dtype=dtype, rope_scaling=rope)
    first = {kind: converted(hf, tmp_path / kind, "--to", kind, "--certify", "none") for kind in _KINDS[1:]}
    _assert_same(converted(hf, tmp_path / "hf-again", "--to", "hf", "--max-shard-bytes", "40000"), hf)
    for kind, folder in first.items():
        _assert_same(converted(folder, tmp_path / f"{kind}-hf"), hf)
    for left, right in itertools.permutations(_KINDS[1:], 2):
        there = converted(first[left], tmp_path / f"{left}-{right}", "--to", right, "--certify", "none")
        _assert_same(converted(there, tmp_path / f"{left}-{right}-hf", "--certify", "none"), hf)


@pytest.mark.parametrize(
    ("rope", "kinds", "refused"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, ("megatron",), ("nemo", "bridge")),
        (_FREE_LLAMA3, ("megatron", "nemo"), ("bridge",)),
    ],
)
def test_scalings_that_a_kind_has_no_words_for_are_refused_and_megatron_keeps_all(
    tmp_path: Path,
    rope: dict[str, Any],
    kinds: tuple[str, ...],
    refused: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_rlt.cli import main

    hf = tiny_hf_model(tmp_path / "hf", "llama", tied=False, num_layers=2, rope_scaling=rope)
    for kind in kinds:
        _assert_same(converted(converted(hf, tmp_path / kind, "--to", kind), tmp_path / f"{kind}-hf"), hf)
    for kind in refused:
        capsys.readouterr()
        assert main(["convert", str(hf), str(tmp_path / kind), "--to", kind, "--tokenizer", "none"]) == 2
        assert "RoPE scaling" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()
    assert not list(tmp_path.glob(".*"))


def test_without_the_travelling_config_the_metadata_alone_describe_the_model(tmp_path: Path) -> None:
    """As of folders that other tools wrote: what is rebuilt computes the same, which the certificate shows."""
    hf = tiny_hf_model(tmp_path / "hf", "llama", tied=True, num_layers=2, rope_scaling=LLAMA3_SCALING)
    for kind in _KINDS[1:]:
        folder = converted(hf, tmp_path / kind, "--to", kind, "--certify", "none")
        for config in folder.rglob("config.json"):
            config.unlink()
        back = converted(folder, tmp_path / f"{kind}-hf")
        assert_bit_equal(folder_tensors(back), folder_tensors(hf))
        certificate = json.loads((back / "conversion.json").read_text())
        assert certificate["logprobs"]["max_difference"] < 1e-5
        assert json.loads((back / "config.json").read_text())["rope_scaling"] == LLAMA3_SCALING


def test_a_dtype_is_cast_and_shards_are_cut(tmp_path: Path) -> None:
    hf = tiny_hf_model(tmp_path / "hf", "qwen3", tied=False, num_layers=2)
    bridge = converted(hf, tmp_path / "bridge", "--to", "bridge", "--dtype", "bfloat16", "--max-shard-bytes", "30000")
    assert len(list((bridge / "iter_0000000").glob("*.distcp"))) > 3
    back = converted(bridge, tmp_path / "back", "--workers", "3")
    assert_bit_equal(folder_tensors(back), {k: v.bfloat16() for k, v in folder_tensors(hf).items()})
