"""A model filled from a folder, on ground that shows what the loader forgets; and a folder's tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout


def loaded_model(folder: Path, layout: Layout, dtype: torch.dtype) -> LanguageModel:
    """Build this rank's stage, set every parameter to 7, then load."""
    model = build_model(Architecture.from_folder(folder), layout, dtype=dtype, recompute="none")
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    load_hf_weights(model, folder)
    return model


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_bit_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
