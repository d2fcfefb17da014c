"""Inputs that all tests of whole runs share, each made once in a test session."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.tiny_runs import ROOT, SCORER_CONFIG, WARMUP_CONFIG, TinyInputs, sft_here, tiny_inputs
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
def warm(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> WarmTeacher:
    """The demo's scorer and warm-up by its own configurations: a minute on two idle cores, then kept in pytest's cache
    until anything changes that made them."""
    cache = pytestconfig.cache
    kept = (cache.mkdir("warm-teacher") if cache else tmp_path_factory.mktemp("warm-teacher")) / _what_makes_it()
    if not kept.exists():
        made = tmp_path_factory.mktemp("warm")
        _warm_up(made)
        for older in kept.parent.iterdir():
            shutil.rmtree(older)
        shutil.move(made, kept)
    return WarmTeacher(
        kept / "teacher" / "hf", kept / "scorer" / "hf", kept / "shards", kept / "assets" / "train.jsonl"
    )


def _what_makes_it() -> str:
    """A hash of every source and setting that the warm-up may depend on."""
    sources = [*(ROOT / "megatron_rlt").rglob("*.py"), *(ROOT / "tools" / "demo").rglob("*.py"), Path(__file__)]
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted([*sources, SCORER_CONFIG, WARMUP_CONFIG]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _warm_up(folder: Path) -> None:
    inputs = tiny_inputs(folder, num_rows=4000)
    model = inputs.model
    for config_file, name in ((SCORER_CONFIG, "scorer"), (WARMUP_CONFIG, "teacher")):
        settings = [f"model.model={model}", f"data.path={inputs.shards}", "metrics.tensorboard=false"]
        assert run_ranks(_sft, 2, folder / name, settings, config_file) == [0, 0]
        model = folder / name / "hf"


def _sft(output_dir: Path, settings: list[str], config_file: Path) -> int:
    return sft_here(output_dir, settings, config_file=config_file)
