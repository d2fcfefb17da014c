"""No model is asked twice: forward passes of each model in each phase of real steps, counted where they happen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.jobs.rl.grpo import update_metrics
from tests.distributed.tiny_runs import TinyInputs, tiny_inputs
from tests.jobs.tiny_steps import tiny_steps
from tests.ranks import run_ranks

ONCE = {("old_policy", "policy"): 1, ("student", "student"): 1, ("update", "policy"): 1}
CASES: dict[str, tuple[list[str], dict[tuple[str, str], int]]] = {
    "no reference": (["grpo.reference=null"], ONCE),
    "the reference, once": (["grpo.reference.beta=0.1"], ONCE | {("reference", "reference"): 1}),
    "two updates: the same log-probs of the old policy": (
        ["grpo.reference=null", "grpo.updates_per_batch=2"],
        ONCE | {("update", "policy"): 2},
    ),
    "exact KL: hidden states of both, once more": (
        ["grpo.reference=null", "reward.kl_estimator=full"],
        ONCE | {("reward", "policy"): 1, ("reward", "student"): 1},
    ),
    "gain: the student also without an explanation": (
        ["grpo.reference=null", "reward.solution_unit=gain"],
        ONCE | {("student", "student"): 2},
    ),
}


def _passes(inputs: TinyInputs, output_dir: Path, settings: list[str]) -> tuple[dict[tuple[str, str], int], Any]:
    """Forward passes by phase and model but for the rollout's, and the metrics of the step's updates."""
    phases: list[str] = []
    counted: Counter[tuple[str, str]] = Counter()
    steps = tiny_steps(inputs, output_dir, *settings, on_phase=phases.append)
    learner = steps.context.learner
    models = {"policy": learner.policy.model, "student": steps.context.students["student"].engine.model}
    if learner.reference_model is not None:
        models["reference"] = learner.reference_model
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: counted.update([(phases[-1], name)]))
    result = steps.take(0)
    assert all(torch.isfinite(values).all() for values in [one.old_logprobs for one in result.completions])
    return {key: count for key, count in counted.items() if key[0] != "rollout"}, update_metrics(result.updates)


def _all_passes(inputs: TinyInputs, folder: Path) -> dict[str, tuple[dict[tuple[str, str], int], Any]]:
    return {name: _passes(inputs, folder, settings) for name, (settings, _) in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[tuple[str, str], int], Any]]:
    inputs = tiny_inputs(tmp_path_factory.mktemp("passes"), num_rows=8)
    by_case: dict[str, Any] = run_ranks(_all_passes, 1, inputs, tmp_path_factory.mktemp("run"))[0]
    return by_case


@pytest.mark.parametrize("case", CASES)
def test_each_model_runs_as_often_as_it_is_needed(case: str, found: dict[str, Any]) -> None:
    assert found[case][0] == CASES[case][1]


def test_the_first_steps_reference_is_the_old_policy_and_the_ratio_is_one(found: dict[str, Any]) -> None:
    """Both have the same weights and see the same pack; the update's own pass differs by its rounding at most."""
    metrics = found["the reference, once"][1]
    assert metrics["ratio_mean"] == 1.0
    assert metrics["kl_to_reference"] == pytest.approx(0.0, abs=1e-9)
