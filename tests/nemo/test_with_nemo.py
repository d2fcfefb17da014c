"""NeMo 2.7.3 itself reads what is written here, and what it writes is read here: the same weights, bit by bit.

Needs `make test-nemo`. NeMo runs in an environment of its own, patched for a CPU: see `oracle.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.cli import main
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.nemo.environment import MARKS, model_for_transformers4, run_oracle
from tests.tiny_models import LLAMA3_SCALING

_ORACLE = "oracle.py"
_LLAMA3 = LLAMA3_SCALING | {"original_max_position_embeddings": 256}
_CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "llama31-tied": {"family": "llama", "tied": True, "rope_scaling": _LLAMA3},
    "qwen2": {"family": "qwen2", "tied": False},
    "qwen2-tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "tied": False, "head_dim": 128},  # NeMo's importer knows no other
}
pytestmark = MARKS


@pytest.fixture(params=_CASES)
def hf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return model_for_transformers4(tmp_path / "hf", **_CASES[request.param])


def test_nemo_loads_and_exports_what_is_written_here(hf: Path, tmp_path: Path) -> None:
    nemo, exported = tmp_path / "nemo", tmp_path / "exported"
    assert main(["convert", str(hf), str(nemo), "--to", "nemo"]) == 0
    config = json.loads((hf / "config.json").read_text())
    built = json.loads(run_oracle(_ORACLE, "context", nemo).splitlines()[-1])
    assert built["num_layers"] == 2
    assert built["hidden_size"] == config["hidden_size"]
    assert built["num_query_groups"] == config["num_key_value_heads"]
    assert built["params_dtype"] == "torch.float32"
    assert built["tokenizer_ids"]
    run_oracle(_ORACLE, "export", nemo, exported)
    found, expected = folder_tensors(exported), folder_tensors(hf)
    if "lm_head.weight" not in expected:  # NeMo's Qwen2 exporter unties
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    assert_bit_equal(found, expected)


def test_what_nemo_imported_is_read_here(hf: Path, tmp_path: Path) -> None:
    nemo, back = tmp_path / "nemo", tmp_path / "back"
    run_oracle(_ORACLE, "import", hf, nemo)
    assert main(["convert", str(nemo), str(back), "--config", str(hf)]) == 0
    assert_bit_equal(folder_tensors(back), folder_tensors(hf))
    certificate = json.loads((back / "conversion.json").read_text())
    assert certificate["logprobs"]["max_difference"] < 1e-5
    # And without it, described by NeMo's metadata alone.
    assert main(["convert", str(nemo), str(tmp_path / "alone")]) == 0
    assert_bit_equal(folder_tensors(tmp_path / "alone"), folder_tensors(hf))
