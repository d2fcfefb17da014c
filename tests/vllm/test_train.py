"""Commands with vLLM, teacher TP2, in both placements: equal log-probs at every step, and nothing is left."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanations import read_explanations
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, ROOT, TinyInputs, tiny_inputs
from tests.vllm.policies import assert_nothing_runs
from tools.demo.make_assets import NUM_VLLM_HEADS

NUM_STEPS = 4
SETTINGS = [
    f"num_steps={NUM_STEPS}",
    "grpo.questions_per_step=4",
    "grpo.group_size=8",
    "grpo.micro_batch_size=8",
    "rollout.max_completion_tokens=16",
    "optimizer.lr=2e-3",
    "optimizer.warmup_fraction=0",
    "data.shuffle_buffer_size=4",
    "metrics.tensorboard=false",
]
COLOCATED = ["rollout.engine=vllm", "rollout.vllm.kv_cache_bytes=33554432"]
SERVER = [*COLOCATED, "rollout.vllm.placement=server"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=16, num_heads=NUM_VLLM_HEADS)


@pytest.fixture(scope="module")
def embedded(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same run with the embedded engine."""
    run = tmp_path_factory.mktemp("embedded") / "run"
    ended = Command("train", RL_CONFIG, [*SETTINGS, *inputs.for_train], run).finish()
    assert ended.status == 0, ended.errors
    return read_metrics(run)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("placement", [COLOCATED, SERVER], ids=["colocated", "server"])
def test_a_run_samples_with_the_trainers_log_probs_at_every_step_and_earns_what_the_embedded_engine_earns(
    placement: list[str], inputs: TinyInputs, embedded: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = Command("train", RL_CONFIG, [*SETTINGS, *placement, *inputs.for_train], run).finish()
    assert ended.status == 0, ended.errors
    metrics = read_metrics(run)
    assert len(metrics) == NUM_STEPS
    assert all(step["rollout_gap_max"] < 1e-4 for step in metrics)
    assert all(step["weight_sync_probe_gap"] < 1e-4 for step in metrics), "every step has another policy"
    for step, expected in zip(metrics, embedded, strict=True):
        rows = list(read_explanations(run / "completions" / f"step-{step['step']:06d}.parquet", with_tokens=True))
        noise = statistics.pstdev(row.reward for row in rows if row.reward is not None)
        assert abs(step["reward"] - expected["reward"]) < 4 * noise / 32**0.5 + 0.05
    assert_nothing_runs(tmp_path)


def test_parity_has_vllm_in_its_two_ways_among_the_programs(inputs: TinyInputs, tmp_path: Path) -> None:
    run = tmp_path / "parity"
    settings = [*COLOCATED, *inputs.for_train, "parity.num_rows=2", "rollout.max_completion_tokens=16"]
    ended = Command("parity", RL_CONFIG, settings, run).finish()
    assert ended.status == 0, ended.errors
    gaps = json.loads((run / "parity.json").read_text())
    sides = {side for gap in gaps for side in gap["sides"]}
    assert {"transformers", "megatron", "vllm sampling", "vllm prompt"} <= sides
    assert all(gap["maximum"] < 1e-4 for gap in gaps)


def test_collect_samples_with_vllm(inputs: TinyInputs, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    source = inputs.model.parent / "train.jsonl"
    rows.write_text("".join(source.read_text().splitlines(keepends=True)[:4]))
    config = ROOT / "configs" / "demo" / "collect_2cpu_dp2.yaml"
    settings = [
        *COLOCATED,
        f"teacher.model={inputs.model}",
        f"data={rows}",
        "num_explanations=2",
        "rollout.max_completion_tokens=16",
    ]
    run = tmp_path / "collected"
    ended = Command("collect", config, settings, run).finish()
    assert ended.status == 0, ended.errors
    files = list(run.rglob("*.parquet"))
    assert files != []


def test_heads_that_vllms_cpu_build_does_not_know_are_refused_before_anything_loads(tmp_path: Path) -> None:
    narrow = tiny_inputs(tmp_path / "narrow", num_rows=16)  # heads of 16
    ended = Command("train", RL_CONFIG, [*SETTINGS, *COLOCATED, *narrow.for_train], tmp_path / "run").finish()
    assert ended.status == 2
    (line,) = ended.errors.splitlines()
    assert line.startswith(
        "megatron-rlt: error: rollout.engine=vllm: vLLM's CPU build has no attention for heads of 16"
    )


def test_what_vllm_refuses_is_told_in_its_words(inputs: TinyInputs, tmp_path: Path) -> None:
    settings = [*SETTINGS, "rollout.engine=vllm", "rollout.vllm.kv_cache_bytes=1024", *inputs.for_train]
    ended = Command("train", RL_CONFIG, settings, tmp_path / "run").finish()
    assert ended.status == 2, ended.errors
    (line,) = [line for line in ended.errors.splitlines() if "megatron-rlt: error" in line]
    assert "rollout.engine=vllm: vLLM does not start: " in line
