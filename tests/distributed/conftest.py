"""Inputs that all tests of whole runs share, each made once in a test session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.tiny_runs import SCORER_CONFIG, WARMUP_CONFIG, TinyInputs, sft_here, tiny_inputs
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """Ten rows: small runs pass the end of an epoch."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=10)


@dataclass(frozen=True)
class WarmTeacher:
    """The demo's models before RL."""

    teacher: Path
    student: Path
    shards: Path
    train_rows: Path

    @property
    def for_train(self) -> list[str]:
        return [f"teacher.model={self.teacher}", f"student.model={self.student}", f"data.path={self.shards}"]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> WarmTeacher:
    """The demo's scorer and warm-up by its own configurations: a minute on two idle cores."""
    folder = tmp_path_factory.mktemp("warm")
    inputs = tiny_inputs(folder, num_rows=4000)
    scorer, teacher = folder / "scorer", folder / "teacher"
    model = inputs.model
    for config_file, output_dir in ((SCORER_CONFIG, scorer), (WARMUP_CONFIG, teacher)):
        settings = [f"model.model={model}", f"data.path={inputs.shards}", "metrics.tensorboard=false"]
        assert run_ranks(_sft, 2, output_dir, settings, config_file) == [0, 0]
        model = output_dir / "hf"
    return WarmTeacher(teacher / "hf", scorer / "hf", inputs.shards, inputs.model.parent / "train.jsonl")


def _sft(output_dir: Path, settings: list[str], config_file: Path) -> int:
    return sft_here(output_dir, settings, config_file=config_file)
