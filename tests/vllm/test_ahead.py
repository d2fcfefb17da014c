"""Sampling while the trainer works: by weights exactly one step old, corrected, resumed with what was sampled."""

from __future__ import annotations

import math
import random
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.config.sections import LayoutConfig
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.models.checksum import checksums_held
from megatron_rlt.rollout.vllm.synced_engines import ServedVllm
from megatron_rlt.store.completions import CompletionRow, read_completions
from megatron_rlt.types import ENDED_EARLY, Completion
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, TinyInputs, tiny_inputs
from tests.ranks import run_ranks
from tests.vllm.policies import (
    Beside,
    Case,
    assert_nothing_runs,
    build,
    dense_rollout_logprobs,
    first_server,
    make_requests,
    save_policy,
    server_processes,
    train_a_little,
)
from tests.vllm.test_train import SERVER, SETTINGS
from tools.demo.make_assets import NUM_VLLM_HEADS

CASE = Case("a server of tp2", LayoutConfig(tp=2, sp=True), "qwen2", tied=False, tp=2)
NUM_STEPS = 8
PARTS = (range(8), range(8, 24))  # of three groups of eight
AHEAD = [*SERVER, "rollout.ahead=1", "mismatch.token_weight_cap=2", "mismatch.max_rollout_gap=1e-4"]


def _collect(engine: ServedVllm, policy_version: int) -> dict[int, tuple[Completion, ...]]:
    come: dict[int, tuple[Completion, ...]] = {}
    while arrivals := engine.arrivals(policy_version):
        for one in arrivals:
            assert one.part not in come, "a part comes once"
            come[one.part] = one.completions
    return come


def sample_while_the_policy_changes(folder: Path, run: Path) -> dict[str, Any]:
    beside = build(folder, CASE, VllmServerConfig(transport="broadcast", bucket_bytes=2**16), run)
    engine = beside.engine
    assert isinstance(engine, ServedVllm)
    found: dict[str, Any] = {"come": [], "metrics": []}
    for version in range(3):
        engine.start(make_requests(), version, PARTS)
        train_a_little(beside.model)
        found["come"].append(_collect(engine, version + 1))
        found["metrics"].append(engine.take_metrics())
    assert beside.served is not None
    found["held"] = beside.served.checksums_held(["model.norm.weight", "model.layers.1.input_layernorm.weight", "else"])
    return found


def test_what_is_sampled_ahead_is_the_policys_of_when_it_was_asked(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    found, other = run_ranks(sample_while_the_policy_changes, 2, folder, tmp_path / "run")
    requests, dense = make_requests(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert found["metrics"][1]["idle_share/trainer"] == other["metrics"][1]["idle_share/trainer"]
    for version, come in enumerate(found["come"]):
        assert sorted(come) == [0, 1]
        assert found["metrics"][version]["weight_sync_probe_gap"] < 1e-4
        for part, asked in enumerate(PARTS):
            for index, one in zip(asked, come[part], strict=True):
                assert one.policy_version == version
                assert one.seed == requests[index].seed
                expected = dense_rollout_logprobs(dense, requests[index], one, CASE)
                assert_close(one.rollout_logprobs, expected, rtol=0, atol=1e-4)
            assert _ids(come[part]) == _ids(other["come"][version][part]), "the same on every rank"
        newest = checksums_held(dense, list(found["held"][0]))
        train_a_little(dense)
    assert len(newest) == 2
    assert found["held"] == [newest, newest], "what the two workers hold came with the last sync"
    assert_nothing_runs(tmp_path)


def lose_the_server_ahead(folder: Path, run: Path) -> dict[str, Any]:
    """Its engine core dies when some questions are answered and some are not; meanwhile the policy has changed."""
    case = replace(CASE, layout=LayoutConfig(), tp=1)
    # One question after the other, and the second is never answered by the old weights.
    beside = build(folder, case, VllmServerConfig(max_concurrent_requests=1, max_retries=1), run)
    engine = beside.engine
    assert isinstance(engine, ServedVllm)
    _before_the_second_question(beside, lambda: server_processes(beside)["core"].send_signal(signal.SIGKILL))
    engine.start(make_requests(), 0, PARTS)
    train_a_little(beside.model)
    found: dict[str, Any] = {"come": _collect(engine, 1), "metrics": engine.take_metrics()}
    found["undisturbed"] = engine.generate(make_requests(), policy_version=1)
    return found


def _before_the_second_question(beside: Beside, act: Callable[[], None]) -> None:
    server = first_server(beside)
    asked, count = server.complete, iter(range(100))

    def complete(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 1:
            act()
        return asked(*args, **kwargs)

    server.complete = complete  # type: ignore[method-assign]


def test_a_server_lost_ahead_keeps_what_it_answered_and_answers_the_rest_with_the_weights_of_now(
    tmp_path: Path,
) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    (found,) = run_ranks(lose_the_server_ahead, 1, folder, tmp_path / "run")
    come = found["come"]
    assert {one.policy_version for one in come[0]} == {0}
    assert {one.policy_version for one in come[1]} == {1}
    assert _ids(come[1]) == _ids(found["undisturbed"])[8:], "the policy's completions of now"
    assert _ids(come[0]) != _ids(found["undisturbed"])[:8]
    assert found["metrics"]["engine_restarts"] == 1.0
    assert found["metrics"]["weight_sync_probe_gap"] < 1e-4
    assert_nothing_runs(tmp_path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=16, num_heads=NUM_VLLM_HEADS)


def test_a_run_ahead_is_one_step_off_policy_and_resumes_with_what_it_had_sampled(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    arguments = [*SETTINGS, *AHEAD, *inputs.for_train, f"num_steps={NUM_STEPS}", "checkpoint.interval_steps=2"]
    whole = Command("train", RL_CONFIG, arguments, tmp_path / "whole").finish()
    assert whole.status == 0, whole.errors
    _check_lag(tmp_path / "whole")
    halved = tmp_path / "halved"
    first = Command("train", RL_CONFIG, arguments, halved).after_steps(2, random.Random(0)).tell(signal.SIGTERM)
    ended = first.finish()
    assert ended.status == ENDED_EARLY, ended.errors
    assert list(halved.glob("checkpoints/step-*/sampled_ahead.bin")) != []
    ended = Command("train", RL_CONFIG, arguments, halved).finish()
    assert ended.status == 0, ended.errors
    assert ended.first_step is not None
    assert 2 < ended.first_step <= NUM_STEPS
    for step in range(1, NUM_STEPS + 1):
        expected, found = _rows(tmp_path / "whole", step), _rows(halved, step)
        assert [row.completion_ids.tolist() for row in found] == [row.completion_ids.tolist() for row in expected]
        for one, other in zip(found, expected, strict=True):
            assert_close(one.reward, other.reward, rtol=0, atol=1e-4, equal_nan=True)
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


def _rows(run: Path, step: int) -> list[CompletionRow]:
    return list(read_completions(run / "completions" / f"step-{step:06d}.parquet"))


def _ids(completions: Any) -> list[list[int]]:
    return [one.token_ids.tolist() for one in completions]
