"""What the owners say they hold is what the plan said; and fifty steps leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs, tiny_inputs
from tests.jobs.tiny_steps import SINGLE_RANK, tiny_steps
from tests.ranks import run_ranks

NUM_STEPS, NUM_WARMUP_STEPS = 50, 15
SETTINGS = ("grpo.reference.beta=0.1", "student.offload=true")


def _robust_slope(values: list[float]) -> float:
    """Theil and Sen: the median slope between all pairs, a step."""
    slopes = [
        (values[later] - values[earlier]) / (later - earlier)
        for earlier in range(len(values))
        for later in range(earlier + 1, len(values))
    ]
    return float(torch.tensor(slopes, dtype=torch.float64).median())


def _take_steps(inputs: TinyInputs, output_dir: Path, num_steps: int) -> dict[str, Any]:
    """Resident bytes and live tensors after every step, and the ledger of the last one."""
    steps = tiny_steps(inputs, output_dir, *SETTINGS)
    steps.memory.watch(steps.context.memory_usage)
    found: dict[str, Any] = {"resident": [], "num_tensors": []}
    for number in range(num_steps):
        steps.take(number)
        found["ledger"] = steps.memory.take()
        RotaryEmbedding.forward.cache_clear()  # Megatron keeps the tables of the last 32 lengths
        gc.collect()
        found["resident"].append(float(psutil.Process().memory_info().rss))
        found["num_tensors"].append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("memory"), num_rows=8)


def test_the_ledger_of_a_step_is_the_plan_and_adds_up(inputs: TinyInputs, tmp_path: Path) -> None:
    ledger = run_ranks(_take_steps, 1, inputs, tmp_path, 2)[0]["ledger"]
    overrides = [*SMALL_RL, *inputs.for_train, *SINGLE_RANK, *SETTINGS, f"output_dir={tmp_path}"]
    config = load_config(TrainConfig, RL_CONFIG, overrides)
    shape = Architecture.from_folder(inputs.model)
    teacher, student = config.plan({"teacher": shape, "student": shape}).models
    for phase in ("rollout", "old_policy", "reference", "update"):
        assert ledger[f"memory/weights_bytes/{phase}"] == teacher.weight_bytes, "policy and reference"
        assert ledger[f"memory/gradients_bytes/{phase}"] >= teacher.gradient_bytes
    assert ledger["memory/weights_bytes/student"] == teacher.weight_bytes + student.weight_bytes, "it is onloaded"
    assert ledger["memory/optimizer_bytes/update"] == pytest.approx(teacher.optimizer_bytes, rel=0.05)
    assert ledger["memory/caches_bytes/rollout"] > 0
    assert ledger["memory/caches_bytes/student"] == 0
    kinds = ("weights", "gradients", "optimizer", "caches", "activations", "other", "host_weights")
    for phase in ("rollout", "student", "update"):
        total = sum(ledger[f"memory/{kind}_bytes/{phase}"] for kind in kinds)
        assert total == ledger[f"memory/peak_bytes/{phase}"]
        assert ledger[f"memory/host_weights_bytes/{phase}"] == student.weight_bytes


@pytest.mark.slow
def test_fifty_steps_leave_nothing_behind(inputs: TinyInputs, tmp_path: Path) -> None:
    """No tensor. Of memory, the allocator moves in its own steps: 64 KiB a step, a sixth of one copy of the weights."""
    found = run_ranks(_take_steps, 1, inputs, tmp_path, NUM_STEPS)[0]
    assert len(set(found["num_tensors"])) == 1
    assert _robust_slope(found["resident"][NUM_WARMUP_STEPS:]) < 64 * 1024


def test_the_slope_finds_a_leak_under_noise() -> None:
    """One more tensor a step, noise of ten, one outlier: slope 1."""
    noise = torch.randn(35, generator=torch.Generator().manual_seed(0)).tolist()
    values = [float(step) + noise[step] for step in range(35)]
    values[3] += 1000.0
    assert _robust_slope(values) == pytest.approx(1.0, abs=0.2)
