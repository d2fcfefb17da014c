"""Saves in the background of a run: measured, one at a time, not lost by a failing step, and their own failures raised.

A disk is made slow by a pause before files are hashed, so that the next step always begins while a save is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.checkpoint import saving
from megatron_rlt.checkpoint.folders import list_checkpoints
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.disk_faults import DiskError
from megatron_rlt.jobs.sft import run_sft
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.types import StoppedError
from tests.distributed.tiny_runs import SCORER_CONFIG, SMALL_SFT, TinyInputs, tiny_inputs
from tests.ranks import run_ranks

_PAUSE_SECONDS = 0.6  # several steps of the tiny model take less


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("saves"), num_rows=8)


def _sft(inputs: TinyInputs, folder: Path, on_data: Callable[[int], None]) -> str:
    """A run of four steps that saves after each; what it returned or raised. `on_data`: told each step, from 1."""
    settings = [*SMALL_SFT, *inputs.for_sft, "checkpoint.interval_steps=1", "checkpoint.background=true"]
    more = ["model.layout={tp: 1}", "world_size=1", "checkpoint.keep_last=9", "checkpoint.export=[]"]
    config = load_config(SftConfig, SCORER_CONFIG, [*settings, *more, f"output_dir={folder}"])
    steps = iter(range(1, 100))

    def on_phase(name: str) -> None:
        if name == "data":
            on_data(next(steps))

    heartbeat = Heartbeat(rank=0, folder=folder, timeout_seconds=600.0, on_phase=on_phase)
    hashed, calls = saving.hash_files, iter(range(1, 100))

    def slowly(*arguments: Any) -> Any:
        if next(calls) == 2 and (folder / "refuse").exists():
            raise PermissionError(13, "Permission denied", str(folder / "checkpoints"))
        time.sleep(_PAUSE_SECONDS)
        return hashed(*arguments)

    saving.hash_files = slowly
    try:
        return str(run_sft(config, heartbeat))
    except (StoppedError, DiskError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        saving.hash_files = hashed


def _measured(inputs: TinyInputs, folder: Path) -> tuple[str, list[list[str]]]:
    seen: list[list[str]] = []
    outcome = _sft(inputs, folder, lambda _: seen.append(_names(folder)))
    return outcome, seen


def _names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def test_each_save_is_complete_before_the_next_and_measured(inputs: TinyInputs, tmp_path: Path) -> None:
    ((outcome, seen),) = run_ranks(_measured, 1, inputs, tmp_path)
    assert outcome == "0"
    names = [f"step-{number:06d}" for number in range(1, 5)]
    assert seen == [[], [], names[:1], names[:2]]  # a step begins while the save before it is written
    assert _names(tmp_path) == names
    assert not list((tmp_path / "checkpoints").glob(".*"))
    metrics = read_metrics(tmp_path)
    assert [step.get("save/step") for step in metrics] == [None, None, 1.0, 2.0]
    for step in metrics[2:]:
        assert step["save/seconds"] > _PAUSE_SECONDS
        assert step["save/bytes_per_second"] == pytest.approx(step["save/bytes"] / step["save/seconds"])
        assert 0 < step["save/stalled_seconds"] < step["save/seconds"]


def _fails_in_a_step(inputs: TinyInputs, folder: Path) -> tuple[str, list[str]]:
    def stop(step: int) -> None:
        if step == 3:
            raise StoppedError(f"stopped while {_names(folder)} were there")

    return _sft(inputs, folder, stop), _names(folder)


def test_a_step_that_fails_does_not_lose_the_save_that_is_being_written(inputs: TinyInputs, tmp_path: Path) -> None:
    ((outcome, names),) = run_ranks(_fails_in_a_step, 1, inputs, tmp_path)
    assert outcome == "StoppedError: stopped while ['step-000001'] were there"
    assert names == ["step-000001", "step-000002"]


def _refused(inputs: TinyInputs, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "refuse").touch()
    return _sft(inputs, folder, lambda _: None)


def test_a_write_that_fails_ends_the_run_at_the_next_step(inputs: TinyInputs, tmp_path: Path) -> None:
    (outcome,) = run_ranks(_refused, 1, inputs, tmp_path)
    assert outcome.startswith(f"DiskError: {tmp_path / 'checkpoints'}")
    assert "cannot be written: Permission denied (" in outcome
    assert _names(tmp_path) == ["step-000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert [step["step"] for step in read_metrics(tmp_path)] == [
        1,
        2,
        3,
    ]  # the 2nd save failed in the 3rd
