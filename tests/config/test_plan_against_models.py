"""The plan's parameter counts against transformers' models and the stages that Megatron really builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.plan import max_rank_parameters, num_parameters
from megatron_rlt.models.build import build_model
from megatron_rlt.parallel.layout import build_layout
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_the_whole_model_has_as_many_parameters_as_the_folder(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny_hf_model(tmp_path / family, family, tied=tied)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a mapping
    assert num_parameters(Architecture.from_folder(folder)) == stored


def test_the_fullest_rank_has_as_many_parameters_as_megatron_builds(tmp_path: Path) -> None:
    folders = [tiny_hf_model(tmp_path / f"{tied}", "qwen2", tied=tied) for tied in (False, True)]
    built = run_ranks(_count_parameters, 2, folders)
    for number, folder in enumerate(folders):
        architecture = Architecture.from_folder(folder)
        for layout, (tp, pp) in enumerate([(2, 1), (1, 2)]):
            fullest = max(counts[number][layout] for counts in built)
            assert max_rank_parameters(architecture, tp=tp, pp=pp) == fullest


def _count_parameters(folders: list[Path]) -> list[list[int]]:
    """Parameters on this rank, one row a folder, one column a layout."""
    layouts = [build_layout(LayoutConfig(tp=2)), build_layout(LayoutConfig(pp=2))]
    return [
        [
            sum(
                parameter.numel()
                for parameter in build_model(
                    Architecture.from_folder(folder), layout, dtype=torch.float32, recompute="none"
                ).parameters()
            )
            for layout in layouts
        ]
        for folder in folders
    ]
