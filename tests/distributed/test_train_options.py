"""`train` with reward options beyond the paper, one step each on two ranks, beside the same step without them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.data.loader import scan_problems
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.prompts.pairs import pair_builder
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations
from tests.distributed.tiny_runs import ENDED_EARLY, RL_CONFIG, SMALL_RL, TinyInputs, train_here
from tests.oracle import dense_logprobs
from tests.ranks import run_ranks
from tools.chaos.outcome import hashes, outcome
from tools.demo.make_assets import save_model

# A reference that is mixed after the first step.
TWO_STEPS = ("num_steps=2", "grpo.reference.beta=0.1", "grpo.reference.sync_steps=1")
RUNS: dict[str, list[str]] = {
    "paper": [],
    "gain": ["reward.solution_unit=gain"],
    "context": ["teacher.layout={cp: 2}"],
    "same folder": ["student.layout={tp: 2, sp: true}", *TWO_STEPS],
    "self": ["student=self", *TWO_STEPS],
    "host": [
        *("student.layout={tp: 2, sp: true}", *TWO_STEPS),
        *("student.offload=true", "grpo.reference.offload=true"),
    ],
}
RESUMED = ("self", "host")


def _train(settings: dict[Path, list[str]]) -> list[int]:
    """All runs; some end after their first step and go on from their checkpoint."""
    ended = [train_here(folder, run, stop_after=1) for folder, run in settings.items() if folder.name in RESUMED]
    assert ended == [ENDED_EARLY] * len(RESUMED)
    return [train_here(folder, run) for folder, run in settings.items()]


@pytest.fixture(scope="module")
def runs(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs' folders, in one."""
    folder = tmp_path_factory.mktemp("options")
    common = [*SMALL_RL, *inputs.for_train, "num_steps=1", "checkpoint.export=[]"]
    save_model(folder / "other", seed=1)
    other = f"{{model: {folder / 'other'}, dtype: float32, layout: {{pp: 2}}}}"
    runs = RUNS | {
        "other alone": [f"student={other}"],
        "minimum": [f"students.extra.other={other}", "students.reduction=minimum"],
        "held out": [f"students.extra.other={other}", "students.held_out=other"],
    }
    statuses = run_ranks(_train, 2, {folder / name: [*common, *settings] for name, settings in runs.items()})
    assert statuses == [[0] * len(runs)] * 2
    return folder


def _rows(run: Path, step: int) -> list[StoredExplanation]:
    return list(read_explanations(run / "completions" / f"step-{step:06d}.parquet", with_tokens=True))


def test_a_gain_is_counted_from_the_dense_models_log_probs_without_an_explanation(
    inputs: TinyInputs, runs: Path, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, RL_CONFIG, [*inputs.for_train, f"output_dir={tmp_path}"])
    student_format = pair_builder(inputs.model, inputs.model, config.prompts).student
    student = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    problems = {problem.problem_id: problem for problem in scan_problems(inputs.shards, part=0, num_parts=1)}
    for plain, row in zip(_rows(runs / "paper", 1), _rows(runs / "gain", 1), strict=True):
        assert torch.equal(plain.completion_ids, row.completion_ids)
        assert torch.equal(plain.student_solution_logprobs, row.student_solution_logprobs)
        bare = student_format.splice(problems[row.id], torch.empty(0, dtype=torch.int64))
        baseline = dense_logprobs(student, bare, config.temperature)
        gains = row.student_solution_logprobs.double() - baseline.double()
        assert row.terms["r_ss_mean"] == pytest.approx(float(gains.mean()), abs=1e-5)
        assert row.terms["r_ss_min"] == pytest.approx(float(gains.min()), abs=1e-5)
        if row.explanation_tokens > 0:
            total = row.terms["r_ss"] - config.reward.lambda_kl * row.terms["r_kl"] + row.terms["penalty"]
            assert row.reward == pytest.approx(total, abs=1e-12)
    assert any(row.explanation_tokens > 0 for row in _rows(runs / "gain", 1))


def test_frozen_models_that_live_on_the_host_change_no_bit_also_after_a_resume(runs: Path) -> None:
    """Student and reference; the reference is mixed, saved and loaded there."""
    on_host, resident = (outcome(runs / name) for name in ("host", "same folder"))
    assert on_host.completions == resident.completions
    assert on_host.metrics == resident.metrics
    assert on_host.metrics[1]["kl_to_reference"] > 0


def test_a_student_that_is_the_teachers_start_gives_the_rewards_of_its_folder_also_after_a_resume(runs: Path) -> None:
    """Bit for bit, in the step after an update as well: neither the policy nor a checkpoint is asked."""
    by_folder, by_word = (hashes(runs / name / "completions") for name in ("same folder", "self"))
    assert by_word == by_folder
    assert len(by_word) == 2
    moved = [float(row.kl_per_token.abs().max()) for row in _rows(runs / "self", 2) if row.explanation_tokens > 0]
    assert max(moved) > 1e-2, "the policy has left its start"


def test_each_of_several_students_gives_the_reward_it_gives_alone_and_the_lowest_counts(runs: Path) -> None:
    alone, other_alone = (_rewards(runs / name) for name in ("paper", "other alone"))
    rows = _rows(runs / "minimum", 1)
    for name, expected in (("student", alone), ("other", other_alone)):
        found = [row.rewards_by_student[name] for row in rows]
        assert [math.nan if one is None else one for one in found] == pytest.approx(expected, abs=0, nan_ok=True)
    lowest = [min(pair) if not math.isnan(sum(pair)) else math.nan for pair in zip(alone, other_alone, strict=True)]
    assert _rewards(runs / "minimum") == pytest.approx(lowest, abs=0, nan_ok=True)
    assert len({a < b for a, b in zip(alone, other_alone, strict=True) if not math.isnan(a + b)}) == 2


def test_a_context_parallel_teacher_samples_scores_and_learns_like_a_tensor_parallel_one(runs: Path) -> None:
    (paper,), (context,) = (read_metrics(runs / name) for name in ("paper", "context"))
    for other, row in zip(_rows(runs / "paper", 1), _rows(runs / "context", 1), strict=True):
        assert torch.equal(other.completion_ids, row.completion_ids)
        assert row.reward == (None if other.reward is None else pytest.approx(other.reward, abs=1e-5))
    assert context["loss"] == pytest.approx(paper["loss"], abs=1e-5)
    assert context["grad_norm"] == pytest.approx(paper["grad_norm"], rel=1e-4)
    assert context["rollout_gap_max"] < 1e-4


def test_a_held_out_student_is_logged_and_changes_nothing(runs: Path) -> None:
    (paper,), (held_out,) = (read_metrics(runs / name) for name in ("paper", "held out"))
    assert held_out["reward/student"] == held_out["reward"] == paper["reward"]
    assert held_out["reward/other"] != paper["reward"]
    assert held_out["grad_norm"] == paper["grad_norm"]
    assert "reward/other" not in paper
    assert _rewards(runs / "held out") == pytest.approx(_rewards(runs / "paper"), abs=0, nan_ok=True)


def _rewards(run: Path) -> list[float]:
    return [math.nan if row.reward is None else row.reward for row in _rows(run, 1)]
