"""metrics.jsonl and TensorBoard: one record a step, also after a kill and a resume."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlt.metrics.writer import METRICS_FILE, MetricsWriter, read_metrics


def _writer(folder: Path, resumed_step: int, *, is_writer: bool = True, tensorboard: bool = False) -> MetricsWriter:
    return MetricsWriter(folder, is_writer=is_writer, resumed_step=resumed_step, tensorboard=tensorboard, wandb=False)


def test_a_step_is_one_json_line(tmp_path: Path) -> None:
    writer = _writer(tmp_path, 0)
    writer.log(1, {"reward": -0.5, "r_ss": math.nan})
    writer.log(2, {"reward": 0.1 + 0.2})
    writer.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "reward": -0.5, "r_ss": None},
        {"step": 2, "reward": 0.1 + 0.2},
    ]


def test_no_step_stands_twice_after_a_resume(tmp_path: Path) -> None:
    first = _writer(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.log(step, {"run": 1.0})
    first.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "ru')  # killed in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    second = _writer(tmp_path, 2)
    second.log(3, {"run": 2.0})
    second.close()
    assert [(record["step"], record["run"]) for record in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_only_the_writer_writes(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "run", 0, is_writer=False, tensorboard=True)
    writer.log(1, {"reward": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_values_and_purges_steps_done_again(tmp_path: Path) -> None:
    for resumed_step, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        writer = _writer(tmp_path, resumed_step, tensorboard=True)
        for step in steps:
            writer.log(step, {"reward/mean": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert seen == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_missing_wandb_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'megatron-rlt\[wandb\]'"):
        MetricsWriter(tmp_path, is_writer=True, resumed_step=0, tensorboard=False, wandb=True)
