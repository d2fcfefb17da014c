"""Two RL steps by the command line: everything a run writes is there and holds what it should."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.data.loader import scan_problems
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.rewards.leaks import leak_metrics
from megatron_rlt.rewards.terms import LABELS
from megatron_rlt.store.explanation_row import StoredExplanation, explanation_schema
from megatron_rlt.store.explanations import read_explanations
from megatron_rlt.store.worst_completions import read_worst_completions
from megatron_rlt.types import FormatFlag, LeakMetrics
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs

LAMBDA_KL = 3
LEAKS = [field.name for field in fields(LeakMetrics)]
# The tiny models write a few signs in random order: only n-grams of one word repeat.
REWARD_SETTINGS = ("reward.kl_estimator=full", f"reward.lambda_kl={LAMBDA_KL}")
LEAK_SETTINGS = ("reward.leaks.ngram=1", "reward.leaks.repetition=-0.5")
PHASES = ("rollout", "old_policy", "student", "reference", "update")
MEMORY_KINDS = ("peak", "weights", "gradients", "optimizer", "caches", "activations", "other", "host_weights")
METRICS = {
    *("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty", "dropped_completions"),
    *("advantage_std", "advantage_share/r_ss", "advantage_share/r_kl", "advantage_share/penalty"),
    *("flag_share/missing_end_tag", "flag_share/truncated", "well_formed_share"),
    *LEAKS,
    *("completion_tokens", "completion_tokens_max", "explanation_tokens", "prompt_tokens", "entropy"),
    *(
        "rollout_gap_mean",
        "rollout_gap_p99",
        "rollout_gap_max",
        "rollout_sequence_kl",
        "loss",
        "ratio_mean",
        "clip_share",
        "kl_to_reference",
        "grad_norm",
        "lr",
    ),
    *(f"seconds/{phase}" for phase in PHASES),
    *(f"memory/{kind}_bytes/{phase}" for kind in MEMORY_KINDS for phase in PHASES),
    *(f"{rate}_per_second/{phase}" for rate in ("tokens", "model_flops") for phase in PHASES),
}


@pytest.fixture(scope="module")
def run(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end") / "run"
    settings = ["num_steps=2", "grpo.reference.beta=0.1", "metrics.tensorboard=true", *REWARD_SETTINGS]
    attempt = Command("train", RL_CONFIG, [*SMALL_RL, *inputs.for_train, *settings, *LEAK_SETTINGS], folder).finish()
    assert attempt.status == 0, attempt.errors
    return folder


def test_every_step_has_all_metrics_and_they_are_finite(run: Path) -> None:
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert set(step) >= METRICS
        assert all(math.isfinite(value) for value in step.values())
        assert step["rollout_gap_max"] < 1e-4
        assert step["r_kl_mean"] >= 0  # the exact divergence cannot be negative
        assert step["grad_norm"] > 0


def test_tensorboard_has_the_same_curves(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(step["step"], pytest.approx(step["reward"], rel=1e-6)) for step in read_metrics(run)]
    assert set(events.Tags()["scalars"]) >= METRICS


def _rows(run: Path, step: int) -> list[StoredExplanation]:
    return list(read_explanations(run / "completions" / f"step-{step:06d}.parquet", with_tokens=True))


def test_the_completion_store_has_a_row_a_completion_with_every_part(run: Path) -> None:
    for step in (1, 2):
        file = run / "completions" / f"step-{step:06d}.parquet"
        assert pq.read_schema(file).names == explanation_schema(tuple(LABELS), None).names
        rows = _rows(run, step)
        assert [(row.question_index, row.explanation_index) for row in rows] == [
            (q, c) for q in (0, 1) for c in range(4)
        ]
        for row in rows:
            assert len(row.completion_ids) == len(row.rollout_logprobs) == len(row.old_logprobs) <= 10
            assert row.kl_per_token is not None
            assert len(row.kl_per_token) == len(row.student_explanation_logprobs) == row.explanation_tokens
            assert len(row.student_solution_logprobs) > 0
            torch.testing.assert_close(row.rollout_logprobs, row.old_logprobs, atol=1e-4, rtol=0)


def test_the_leaks_are_those_of_the_stored_texts(run: Path, inputs: TinyInputs) -> None:
    """The demo's solutions have no box, so that no answer is looked for."""
    solutions = {problem.problem_id: problem.solution for problem in scan_problems(inputs.shards, part=0, num_parts=1)}
    rows = [*_rows(run, 1), *_rows(run, 2)]
    for row in rows:
        expected = leak_metrics(row.explanation, solutions[row.id], answer=None, ngram=1, closing_share=0.2)
        assert row.leaks == expected
    assert len({row.leaks.repetition for row in rows}) > 1


def test_rewards_and_advantages_follow_from_the_stored_parts(run: Path) -> None:
    """r = r_SS - lambda r_KL + penalty; A = (r - mean) / (std + 1e-4) within a group; no explanation, no reward."""
    for row in [*_rows(run, 1), *_rows(run, 2)]:
        if row.explanation_tokens == 0:
            assert row.reward is None
            assert row.advantage == 0
            continue
        assert row.kl_per_token is not None
        solution, kl = row.student_solution_logprobs.double(), row.kl_per_token.double()
        r_ss, r_kl = solution.mean() + 0.01 * solution.min(), kl.mean() + 0.01 * kl.max()
        penalty = -5.0 if FormatFlag.MISSING_END_TAG in row.flags else 0.0
        penalty += -0.5 * row.leaks.repetition
        assert row.terms["penalty"] == pytest.approx(penalty, abs=1e-12)
        assert row.reward == pytest.approx(float(r_ss - LAMBDA_KL * r_kl) + penalty, abs=1e-5)
    for step, question in ((1, 0), (1, 1), (2, 0), (2, 1)):
        group = [row for row in _kept(_rows(run, step)) if row.question_index == question]
        rewards = [row.reward for row in group]
        scale = stdev(rewards) + 1e-4
        expected = [(reward - mean(rewards)) / scale for reward in rewards]
        assert [row.advantage for row in group] == pytest.approx(expected, abs=1e-6)


def test_the_metrics_are_what_the_completions_say(run: Path) -> None:
    for step in read_metrics(run):
        rows = _rows(run, step["step"])
        kept = _kept(rows)
        gaps = torch.cat([row.rollout_logprobs - row.old_logprobs for row in rows]).abs()
        expected = {
            "reward": mean(row.reward for row in kept),
            "r_ss": mean(row.terms["r_ss"] for row in kept),
            "r_kl_max": mean(row.terms["r_kl_max"] for row in kept),
            "dropped_completions": 8 - len(kept),
            "advantage_std": stdev(row.advantage for row in rows),
            "flag_share/truncated": mean(FormatFlag.TRUNCATED in row.flags for row in rows),
            "well_formed_share": mean(not row.flags for row in rows),
            "completion_tokens": mean(len(row.completion_ids) for row in rows),
            "explanation_tokens": mean(row.explanation_tokens for row in rows),
            "prompt_tokens": mean(len(row.prompt_ids) for row in rows),
            "rollout_gap_mean": float(gaps.mean()),
            "rollout_gap_max": float(gaps.max()),
            **{name: mean(vars(row.leaks)[name] for row in rows) for name in LEAKS},
        }
        assert {name: step[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_worst_completion_of_each_step_is_the_stored_one_with_the_largest_gap(run: Path) -> None:
    worst = read_worst_completions(run)
    assert [line["step"] for line in worst] == [1, 2]
    for line in worst:
        rows = _rows(run, line["step"])
        gaps = [(row.rollout_logprobs - row.old_logprobs).abs() for row in rows]
        index = max(range(len(rows)), key=lambda at: float(gaps[at].max()))
        row, token = rows[index], int(gaps[index].argmax())
        assert (line["question_index"], line["completion_index"]) == (row.question_index, row.explanation_index)
        assert (line["problem_id"], line["seed"]) == (row.id, row.seed)
        assert (line["token_index"], line["token_id"]) == (token, int(row.completion_ids[token]))
        assert line["gap"] == float(gaps[index].max())
        assert line["text"].startswith(row.explanation)


def _kept(rows: list[StoredExplanation]) -> list[StoredExplanation]:
    return [row for row in rows if row.explanation_tokens > 0]


def test_the_exported_teacher_loads_in_transformers_with_changed_weights(run: Path, inputs: TinyInputs) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs.model, run / "hf"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    logits = model(**tokenizer("<q> 5 +5 *5 *6 +4", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()
    assert logits.shape[-1] == len(tokenizer)


def test_the_run_folder_says_what_ran(run: Path, inputs: TinyInputs) -> None:
    config = load_config(TrainConfig, run / "config.yaml", [])
    assert (config.num_steps, config.teacher.model, config.output_dir) == (2, inputs.model, run)
    papers = json.loads((run / "run.json").read_text())
    (start,) = papers["starts"]
    assert (papers["command"], start["world_size"]) == ("train", 2)
    assert start["versions"]["megatron-core"] == "0.16.1"
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
