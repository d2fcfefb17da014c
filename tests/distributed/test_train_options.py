"""`train` with reward options beyond the paper, one step each on two ranks, beside the same step without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.jobs import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.data.scan import scan_problems
from megatron_rlt.metrics.completions import CompletionRow, read_completions
from megatron_rlt.prompts.formats import pair_builder
from megatron_rlt.rewards.solution_score import solution_score
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs, train_here
from tests.oracle import dense_logprobs
from tests.ranks import run_ranks

RUNS: dict[str, list[str]] = {
    "paper": [],
    "gain": ["reward.solution_unit=gain"],
}


def _train(settings: dict[Path, list[str]]) -> list[int]:
    return [train_here(folder, run) for folder, run in settings.items()]


@pytest.fixture(scope="module")
def runs(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[CompletionRow]]:
    """The completions of the first step by the run's name."""
    folder = tmp_path_factory.mktemp("options")
    common = [*SMALL_RL, *inputs.for_train, "num_steps=1", "checkpoint.export_hf=false"]
    statuses = run_ranks(_train, 2, {folder / name: [*common, *settings] for name, settings in RUNS.items()})
    assert statuses == [[0] * len(RUNS)] * 2
    return {name: read_completions(folder / name / "completions" / "step-000001.parquet") for name in RUNS}


def test_a_gain_is_counted_from_the_dense_models_log_probs_without_an_explanation(
    inputs: TinyInputs, runs: dict[str, list[CompletionRow]], tmp_path: Path
) -> None:
    config = load_config(TrainConfig, RL_CONFIG, [*inputs.for_train, f"output_dir={tmp_path}"])
    student_format = pair_builder(inputs.model, inputs.model, config.prompts).student
    student = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    problems = {problem.problem_id: problem for problem in scan_problems(inputs.shards, part=0, num_parts=1)}
    for plain, row in zip(runs["paper"], runs["gain"], strict=True):
        assert torch.equal(plain.completion_ids, row.completion_ids)
        assert torch.equal(plain.student_solution_logprobs, row.student_solution_logprobs)
        bare = student_format.splice(problems[row.problem_id], torch.empty(0, dtype=torch.int64))
        baseline = dense_logprobs(student, bare, config.temperature)
        expected = solution_score(
            row.student_solution_logprobs, baseline_logprobs=baseline, unit="gain", alpha=config.reward.alpha
        )
        assert row.r_ss_mean == pytest.approx(expected.mean, abs=1e-5)
        assert row.r_ss_min == pytest.approx(expected.worst, abs=1e-5)
        if row.num_explanation_tokens > 0:
            total = row.r_ss - config.reward.lambda_kl * row.r_kl + row.penalty
            assert row.reward == pytest.approx(total, abs=1e-12)
    assert any(row.num_explanation_tokens > 0 for row in runs["gain"])
