"""Megatron-Bridge 0.3.1 itself reads what is written here, and what it writes is read here: the same weights.

Needs `make test-nemo`. Bridge runs in NeMo's environment, patched for a CPU: see `bridge_oracle.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlt.cli import main
from tests.models.loading import assert_bit_equal, folder_tensors
from tests.nemo.environment import MARKS, model_for_transformers4, run_oracle
from tests.tiny_models import LLAMA3_SCALING

_ORACLE = "bridge_oracle.py"
_CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "llama31-tied": {"family": "llama", "tied": True, "rope_scaling": LLAMA3_SCALING},
    "qwen2-tied-bf16": {"family": "qwen2", "tied": True, "dtype": torch.bfloat16},
    "qwen3": {"family": "qwen3", "tied": False},
}
pytestmark = MARKS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per case, with its Hugging Face folder `hf`. Bridge is slow to import: it gets all cases at once."""
    root = tmp_path_factory.mktemp("models")
    for case, settings in _CASES.items():
        model_for_transformers4(root / case / "hf", **settings)
    return {case: root / case for case in _CASES}


def _without_weights(hf: Path, folder: Path) -> Path:
    """The same model with zeros: Bridge must take every value from the folder that it exports."""
    folder.mkdir()
    for file in hf.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(zeros, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bridge_exports_what_is_written_here(models: dict[str, Path]) -> None:
    exports: list[Path] = []
    for folder in models.values():
        assert main(["convert", str(folder / "hf"), str(folder / "bridge"), "--to", "bridge"]) == 0
        exports += (folder / "bridge", _without_weights(folder / "hf", folder / "zeros"), folder / "exported")
    run_oracle(_ORACLE, "export", *exports)
    for folder in models.values():
        assert_bit_equal(folder_tensors(folder / "exported"), folder_tensors(folder / "hf"))


def test_what_bridge_imported_is_read_here(models: dict[str, Path]) -> None:
    run_oracle(_ORACLE, "import", *(place for f in models.values() for place in (f / "hf", f / "imported")))
    for folder in models.values():
        # Described by Bridge's own run_config.yaml alone.
        assert main(["convert", str(folder / "imported"), str(folder / "back")]) == 0
        assert_bit_equal(folder_tensors(folder / "back"), folder_tensors(folder / "hf"))
        certificate = json.loads((folder / "back" / "conversion.json").read_text())
        assert certificate["logprobs"]["max_difference"] < 1e-5
