"""Every configuration that the project ships reads as one of its command, without an unknown or wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.config.jobs import CollectConfig, EvaluateConfig, PrepareConfig, SftConfig, TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.solver import SolverConfig

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
CLASSES = {
    "prepare": PrepareConfig,
    "rlt": TrainConfig,
    "sft": SftConfig,
    "scorer": SftConfig,
    "student": SftConfig,
    "warmup": SftConfig,
    "solver": SolverConfig,
    "collect": CollectConfig,
    "evaluate": EvaluateConfig,
}


def test_there_are_configurations() -> None:
    assert len(FILES) >= 7


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_a_shipped_configuration_reads(file: Path) -> None:
    command = file.stem.split("_")[0]
    config = load_config(CLASSES[command], file, [])
    if isinstance(config, TrainConfig):  # the file name spells the layout: ranks per node, then both models
        assert f"_tp{config.teacher.layout.tp}" in file.stem
