"""Configurations of 7B and 32B models that need nothing but a folder with config.json, and the work they plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.plan import PlanConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_overrides
from megatron_rlt.planning.platform import Platform
from megatron_rlt.planning.work import Work, work_of
from tests.config.model_folders import QWEN2
from tests.config.test_shipped_configurations import QWEN_7B, QWEN_32B

SIZES: dict[str, dict[str, Any]] = {"7b": QWEN_7B, "32b": QWEN_32B}
GPU = Platform.of(PlanConfig(config=Path("-")))


def config_folder(folder: Path, size: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN2 | SIZES[size]))
    return folder


def train_config(folder: Path, *overrides: str, student: str = "7b") -> TrainConfig:
    """The paper's batch, on 8 ranks; prompts of at most 1,000 and completions of at most 3,000 tokens."""
    settings = {
        "output_dir": str(folder / "run"),
        "world_size": 8,
        "teacher": {"model": str(config_folder(folder / "7b", "7b"))},
        "student": {"model": str(config_folder(folder / student, student))},
        "data": {"path": "rows.jsonl"},
        "prompts": {"max_prompt_tokens": 1000},
        "rollout": {"max_completion_tokens": 3000},
    }
    return load_overrides(TrainConfig, settings, overrides)


def train_work(folder: Path, *overrides: str, student: str = "7b") -> Work:
    config = train_config(folder, *overrides, student=student)
    shapes = {name: Architecture.from_folder(model.model) for name, model in config.models.items()}
    assert config.faults(shapes) == []
    return work_of(config, shapes, prompt=None, completion=None)
