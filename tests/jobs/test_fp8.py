"""`score` and `train` with a frozen FP8 student in TP 2 with SP beside a teacher in TP 1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.tiny_runs import SMALL_RL, tiny_inputs, train_here
from tests.fp8_scores import small_student
from tests.jobs.tiny_scores import PhaseLog, score_inputs, score_on_ranks
from tests.ranks import run_ranks

SPLIT = {"tp": 2, "sp": True}
SECTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "blockwise": {"fp8": {}},
    "storage": {"fp8": {"activations": False}, "offload": True},
}


def _score(configs: list[ScoreConfig]) -> list[int]:
    return [score_on_ranks(config, PhaseLog()) for config in configs]


def test_score_rewards_by_an_fp8_student(tmp_path: Path) -> None:
    inputs = score_inputs(tmp_path / "inputs")
    student = {"model": small_student(tmp_path / "student", teacher=inputs.teacher), "dtype": "bfloat16"}
    configs = {
        name: inputs.config(tmp_path / name, student=student | {"layout": SPLIT} | section, world_size=2)
        for name, section in SECTIONS.items()
    }
    assert run_ranks(_score, 2, list(configs.values())) == [[0] * len(SECTIONS)] * 2

    scored = {name: pq.read_table(config.output).to_pylist() for name, config in configs.items()}
    rewards = {name: [row["reward"] for row in rows] for name, rows in scored.items()}
    assert [reward is None for reward in rewards["blockwise"]] == [reward is None for reward in rewards["bf16"]]
    tokens = {
        name: torch.tensor([p for row in rows for p in row["student_solution_logprobs"]])
        for name, rows in scored.items()
    }
    for name in ("blockwise", "storage"):
        error = (tokens[name] - tokens["bf16"]).abs().mean()
        assert 0.03 < error < 1.0, f"{name}: {error}"


def _train(output_dir: Path, settings: list[str]) -> int:
    return train_here(output_dir, settings)


def test_train_steps_with_an_fp8_student_that_is_offloaded(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=10)
    student = small_student(tmp_path / "student", teacher=inputs.model)
    settings = [*SMALL_RL, *inputs.for_train, "num_steps=2", "checkpoint.export=[]", "teacher.layout={}"]
    settings += [f"student={{model: {student}, layout: {{tp: 2, sp: true}}, fp8: {{}}, offload: true}}"]
    assert run_ranks(_train, 2, tmp_path / "run", settings) == [0, 0]
    steps = read_metrics(tmp_path / "run")
    assert len(steps) == 2
    assert all(math.isfinite(value) for step in steps for value in step.values())
    # Per rank at tp 2, of each of 2 layers: 512 x 256 + 256 x 256 + 512 x 256 + 256 x 256 codes, in blocks of 128 x 128
    # that have scales of 4 bytes (8 + 4 + 8 + 4); 5 norms of 256 in bfloat16, and half of two vocabulary tables.
    vocabulary = 2 * math.ceil(_vocab_size(student) / 2) * 256 * 2
    expected = 2 * (393_216 + 24 * 4) + 5 * 256 * 2 + vocabulary
    assert steps[0]["memory/host_weights_bytes/student"] == pytest.approx(expected)


def _vocab_size(folder: Path) -> int:
    size: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return size
