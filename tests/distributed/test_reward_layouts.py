"""`score` gives the rewards of the dense oracle whatever layouts teacher and student have."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.commands.score import ScoreConfig
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.prompts.pairs import pair_builder
from megatron_rlt.types import Problem, ScoringPair
from tests.jobs.tiny_scores import QUESTION, TRACES, PhaseLog, ScoreInputs, score_inputs, score_on_ranks
from tests.oracle import dense_logprobs, dense_reward
from tests.ranks import run_ranks

ALPHA, LAMBDA_KL, TAG_PENALTY = 0.05, 3.0, -0.25
SETTINGS = {2: tuple(product((1.0, 0.7), ("k1", "k3", "full"))), 4: ((1.0, "k1"), (0.7, "k3"), (0.7, "full"))}
TP2_SP = LayoutConfig(tp=2, sp=True)
LAYOUTS = {
    2: {
        "tp1 beside tp1": (LayoutConfig(), LayoutConfig()),
        "tp2+sp beside dp2": (TP2_SP, LayoutConfig()),
        "tp2+sp beside pp2": (TP2_SP, LayoutConfig(pp=2)),
        "cp2 beside tp2+sp": (LayoutConfig(cp=2), TP2_SP),
    },
    4: {
        "tp2 x pp2+sp beside tp4": (LayoutConfig(tp=2, pp=2, sp=True), LayoutConfig(tp=4)),
        "pp2 x dp2 beside tp2": (LayoutConfig(pp=2), LayoutConfig(tp=2)),
        "tp2 x cp2+sp beside pp2 x cp2": (LayoutConfig(tp=2, sp=True, cp=2), LayoutConfig(pp=2, cp=2)),
    },
}
Key = tuple[float, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ScoreInputs:
    return score_inputs(tmp_path_factory.mktemp("score"))


@pytest.fixture(scope="module")
def dense(inputs: ScoreInputs, tmp_path_factory: pytest.TempPathFactory) -> dict[Key, list[dict[str, Any]]]:
    """The oracle's rows by temperature and estimator; a row without explanation has no reward."""
    config = inputs.config(tmp_path_factory.mktemp("dense"))
    pairs = pair_builder(inputs.teacher, inputs.student, config.prompts)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (inputs.teacher, inputs.student)]
    found = [pairs.pair_from_text(Problem("", QUESTION, solution), text) for solution, text in TRACES]
    return {
        (temperature, estimator): [_dense_row(*models, pair, temperature, estimator) for pair in found]
        for temperature, estimator in SETTINGS[2]
    }


def _dense_row(teacher: Any, student: Any, pair: ScoringPair, temperature: float, estimator: str) -> dict[str, Any]:
    count = pair.num_explanation_tokens
    solution = dense_logprobs(student, pair.student, temperature)[count:]
    if count == 0:
        return {"reward": None, "student_solution_logprobs": solution}
    parts: dict[str, Any] = dense_reward(
        teacher,
        student,
        pair,
        temperature=temperature,
        alpha=ALPHA,
        lambda_kl=LAMBDA_KL,
        kl_estimator=estimator,
        penalty=TAG_PENALTY if "contains_tags" in pair.flags else 0.0,
    )
    return parts | {
        "student_solution_logprobs": solution,
        "student_explanation_logprobs": dense_logprobs(student, pair.student, temperature)[:count],
        "teacher_explanation_logprobs": dense_logprobs(teacher, pair.teacher, temperature)[:count],
    }


def _score_all(configs: list[ScoreConfig]) -> list[int]:
    return [score_on_ranks(config, PhaseLog()) for config in configs]


@pytest.mark.parametrize("world_size", [2, 4])
def test_rewards_equal_the_dense_oracle_in_every_layout(
    world_size: int, inputs: ScoreInputs, dense: dict[Key, list[dict[str, Any]]], tmp_path: Path
) -> None:
    cases = {
        (name, key): inputs.config(
            tmp_path / f"{name} {key}",
            temperature=key[0],
            teacher={"model": inputs.teacher, "dtype": "float32", "layout": teacher},
            student={"model": inputs.student, "dtype": "float32", "layout": student},
            reward={
                "alpha": ALPHA,
                "lambda_kl": LAMBDA_KL,
                "kl_estimator": key[1],
                "penalties": {"contains_tags": TAG_PENALTY},
            },
            rows_per_part=5,
        )
        for (name, (teacher, student)), key in product(LAYOUTS[world_size].items(), SETTINGS[world_size])
    }
    statuses = run_ranks(_score_all, world_size, list(cases.values()))

    assert statuses == [[0] * len(cases)] * world_size
    for (name, key), config in cases.items():
        rows = pq.read_table(config.output).to_pylist()
        assert [row["id"] for row in rows] == [f"row {number}" for number in range(len(TRACES))]
        for number, (found, expected) in enumerate(zip(rows, dense[key], strict=True)):
            _assert_equal(found, expected, f"{name}, T {key[0]}, {key[1]}, row {number}")


def _assert_equal(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    """`rel`: k3's exp makes of float32's 1.2e-7 at a gap of 6 nats some 1e-6 of the reward."""
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert len(found[name]) == len(value), f"{case}: {name}"
            assert found[name] == pytest.approx(value.tolist(), rel=1e-6, abs=1e-5), f"{case}: {name}"
        else:
            assert found[name] == (None if value is None else pytest.approx(value, rel=2e-6, abs=1e-5)), case
    assert (found["dropped"] is None) == (expected["reward"] is not None), case


def test_the_oracle_tells_estimators_temperatures_and_rows_apart(dense: dict[Key, list[dict[str, Any]]]) -> None:
    rewards = [row["reward"] for rows in dense.values() for row in rows if row["reward"] is not None]
    ordered = sorted(rewards)
    assert min(b - a for a, b in pairwise(ordered)) > 1e-4
    shortest = min(len(row["student_solution_logprobs"]) for rows in dense.values() for row in rows)
    assert shortest == 2, "one token and the newlines behind it"
