"""`inspect` says what a folder is; a distributed checkpoint under Hugging Face names is read, whatever its prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from megatron_rlt.cli import main
from tests.convert.conversions import converted
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.tiny_models import tiny_hf_model


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def _screen(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """The lines of `inspect` by their first word."""
    capsys.readouterr()
    assert main(["inspect", str(folder), *options]) == 0
    lines = [line.replace("│", " ").split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    return {words[0]: " ".join(words[1].split()) for words in lines if len(words) == 2}


def test_one_screen_names_kind_architecture_size_layout_and_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = tiny_hf_model(
        tmp_path / "hf", "qwen2", tied=True, num_layers=2, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    )
    megatron = converted(hf, tmp_path / "megatron", "--to", "megatron", "--certify", "none")
    screen = _screen(megatron, capsys)
    assert screen["kind"] == "Megatron-LM checkpoint, released weights (megatron)"
    assert screen["architecture"] == (
        "qwen2, 2 layers, hidden 64, 4 heads of 16 (2 key-value), ffn 96, vocabulary 131, tied, 512 positions, RoPE"
        " 10000 yarn"
    )
    # Embedding 131 x 64; each layer 64 x (64 + 2 x 32) and biases, 64 x 64, 3 x 64 x 96 and two norms; the last norm.
    assert screen["parameters"] == f"{131 * 64 + 2 * (64 * 128 + 128 + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64:,}"
    assert screen["saved"] == "in 1 files written by 1 ranks, tensor-parallel 1"
    assert screen["can"] == "become --to hf"  # NeMo and Bridge have no words for yarn
    assert _screen(hf, capsys)["can"] == "become --to megatron"


@pytest.mark.parametrize("prefix", ["", "model.", "app.model."])
def test_a_distributed_checkpoint_of_a_hugging_face_model_is_read(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = tiny_hf_model(tmp_path / "hf", "llama", tied=False, num_layers=2)
    state = {prefix + name: tensor for name, tensor in folder_tensors(hf).items()}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert main(["inspect", str(tmp_path / "dcp")]) == 2
    assert "does not say what model it is; name the Hugging Face folder" in capsys.readouterr().err
    assert "(fsdp)" in _screen(tmp_path / "dcp", capsys, "--config", str(hf))["kind"]
    back = converted(tmp_path / "dcp", tmp_path / "back", "--config", str(hf))
    assert_bit_equal(folder_tensors(back), folder_tensors(hf))
    nemo = converted(tmp_path / "dcp", tmp_path / "nemo", "--to", "nemo", "--config", str(hf), "--from", "fsdp")
    assert_bit_equal(folder_tensors(converted(nemo, tmp_path / "again")), folder_tensors(hf))
