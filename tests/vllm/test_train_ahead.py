"""A run that samples while it trains: by weights exactly one step old, corrected, resumed with what was sampled."""

from __future__ import annotations

import math
import random
import signal
import statistics
from pathlib import Path

import pytest
from torch.testing import assert_close

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.explanations import read_explanations
from megatron_rlt.types import ENDED_EARLY
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, tiny_inputs
from tests.vllm.policies import assert_nothing_runs
from tests.vllm.test_train import SERVER, SETTINGS
from tools.demo.make_assets import NUM_VLLM_HEADS

NUM_STEPS = 6
AHEAD = [*SERVER, "rollout.ahead=1", "mismatch.token_weight_cap=2", "mismatch.max_rollout_gap=1e-4"]


@pytest.mark.usefixtures("plugin")
def test_a_run_ahead_is_one_step_off_policy_and_resumes_with_what_it_had_sampled(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=16, num_heads=NUM_VLLM_HEADS)
    settings = (f"num_steps={NUM_STEPS}", "checkpoint.interval_steps=2")
    arguments = [*SETTINGS, *AHEAD, *inputs.for_train, *settings]
    halved, whole = tmp_path / "halved", tmp_path / "whole"
    ended = Command("train", RL_CONFIG, arguments, whole).finish()
    assert ended.status == 0, ended.errors
    _check_lag(whole)
    first = Command("train", RL_CONFIG, arguments, halved).after_steps(2, random.Random(0)).tell(signal.SIGTERM)
    ended = first.finish()
    assert ended.status == ENDED_EARLY, ended.errors
    assert list(halved.glob("checkpoints/step-*/sampled_ahead.bin")) != []
    ended = Command("train", RL_CONFIG, arguments, halved).finish()
    assert ended.status == 0, ended.errors
    assert ended.first_step is not None
    assert 2 < ended.first_step <= NUM_STEPS
    for step in range(1, NUM_STEPS + 1):
        expected, found = _rows(whole, step), _rows(halved, step)
        assert [row.completion_ids.tolist() for row in found] == [row.completion_ids.tolist() for row in expected]
        assert_close(_rewards(found), _rewards(expected), rtol=0, atol=1e-4, equal_nan=True)
    assert_nothing_runs(tmp_path)


def _check_lag(run: Path) -> None:
    metrics = read_metrics(run)
    assert [step["policy_lag"] for step in metrics] == [0.0] + [1.0] * (NUM_STEPS - 1)
    assert metrics[0]["rollout_gap_max"] < 1e-4
    assert metrics[1]["rollout_gap_max"] > 1e-3, "the gap of one update, which max_rollout_gap does not stop"
    assert all(step["weight_sync_probe_gap"] < 1e-4 for step in metrics[:-1])
    for step in metrics:
        assert 0.0 <= step["idle_share/trainer"] <= 1.0
        assert 0.0 <= step["idle_share/engine"] <= 1.0
    lagging = _rows(run, 2)
    ratios = [
        min(math.exp(theirs - sampled), 2.0)
        for row in lagging
        for theirs, sampled in zip(row.old_logprobs.tolist(), row.rollout_logprobs.tolist(), strict=True)
    ]
    assert metrics[1]["rollout_weight_mean"] == pytest.approx(statistics.mean(ratios), abs=1e-6)
    assert metrics[1]["rollout_weight_mean"] != pytest.approx(1.0, abs=1e-6)


def _rows(run: Path, step: int) -> list[StoredExplanation]:
    return list(read_explanations(run / "completions" / f"step-{step:06d}.parquet", with_tokens=True))


def _rewards(rows: list[StoredExplanation]) -> list[float]:
    return [math.nan if row.reward is None else row.reward for row in rows]
