"""The noise of an FP8 student's rewards is measured, groups within it teach nothing, and a resumed run knows it."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev, variance

import pytest

from megatron_rlt.config.models import ModelConfig, ScoringConfig
from megatron_rlt.jobs.train.noise_floor import NoiseProbe
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanations import read_explanations
from tests.distributed.tiny_runs import SMALL_RL, TinyInputs, tiny_inputs, train_here
from tests.fp8_scores import small_student
from tests.jobs.tiny_steps import tiny_steps
from tests.ranks import run_ranks
from tools.chaos.outcome import outcome

STUDENTS = {"bf16": "null", "blockwise": "{}", "tensorwise": "{recipe: tensorwise}"}
GROUP_SIZE = 4


def _first_step(
    inputs: TinyInputs, folder: Path, model: Path
) -> dict[str, tuple[list[list[int]], list[float], float, float]]:
    """By student: sampled ids, rewards, measured noise, and the part of it that pack-mates make."""
    found = {}
    for name, fp8 in STUDENTS.items():
        student = f"student={{model: {model}, dtype: bfloat16, fp8: {fp8}}}"
        steps = tiny_steps(inputs, folder / name, student, "reward.noise_floor=auto")
        taken = steps.take(0).completions
        noise = steps.context.noise_floor.metrics(num_below=0)["reward_noise"]
        as_bfloat16 = {"student": ModelConfig(model=model)}  # nothing to compare with, so only pack-mates are left
        teacher = steps.context.learner.old_policy
        probe = NoiseProbe(steps.context.students, as_bfloat16, None, teacher, ScoringConfig())
        # The teacher has changed meanwhile; its part of a reward is the stored one.
        mates = probe.measure(taken, GROUP_SIZE, steps.timer)
        found[name] = (
            [one.completion.token_ids.tolist() for one in taken],
            [one.reward for one in taken],
            noise,
            mates,
        )
    return found


def test_the_noise_is_the_distance_from_bfloat16_within_groups(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=4)
    model = small_student(tmp_path / "student", teacher=inputs.model)
    (found,) = run_ranks(_first_step, 1, inputs, tmp_path, model)
    exact_ids, exact, noise_of_bf16, _ = found["bf16"]
    assert noise_of_bf16 < 1e-6
    for name in ("blockwise", "tensorwise"):
        ids, rewards, noise, mates = found[name]
        assert ids == exact_ids
        errors = [one - other for one, other in zip(rewards, exact, strict=True)]
        # Two groups of four: the mean of their variances.
        distance = ((variance(errors[:GROUP_SIZE]) + variance(errors[GROUP_SIZE:])) / 2) ** 0.5
        assert noise == pytest.approx(max(distance, mates), rel=1e-6)
        assert noise > 1e-3
    assert found["blockwise"][3] < 1e-6  # blocks know nothing of pack-mates
    assert found["tensorwise"][3] > 1e-3


def _lives(folder: Path, settings: list[str]) -> list[int]:
    whole = [*settings, "reward.noise_floor=auto", "reward.noise_floor_factor=8"]
    return [
        train_here(folder / "whole", [*whole, "num_steps=2"]),
        train_here(folder / "resumed", [*whole, "num_steps=1"]),
        train_here(folder / "resumed", [*whole, "num_steps=2"]),
        train_here(folder / "given", [*settings, "reward.noise_floor=1000.0", "num_steps=1"]),
    ]


def test_groups_below_the_floor_teach_nothing_also_after_a_resume(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=10)
    model = small_student(tmp_path / "student", teacher=inputs.model)
    settings = [*SMALL_RL, *inputs.for_train, "teacher.layout={}", "reward.penalties.missing_end_tag=0"]
    settings += [f"student={{model: {model}, layout: {{tp: 2, sp: true}}, fp8: {{}}, offload: true}}"]
    assert run_ranks(_lives, 2, tmp_path, settings) == [[0] * 4] * 2

    first, second = read_metrics(tmp_path / "whole")
    assert first["reward_noise"] == second["reward_noise"] > 1e-3
    assert first["noise_floor"] == 8 * first["reward_noise"]
    assert "seconds/noise_floor" in first
    assert all("seconds/noise_floor" not in step for step in (second, read_metrics(tmp_path / "resumed")[1]))
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")
    gated = [_num_gated(tmp_path / "whole", number, metrics) for number, metrics in ((1, first), (2, second))]
    assert 0 < sum(gated) < 4  # of two groups in each of two steps
    (all_below,) = read_metrics(tmp_path / "given")
    assert all_below["groups_below_noise_floor"] == 2
    assert all_below["advantage_std"] == all_below["grad_norm"] == 0.0
    assert all_below["advantage_share/r_kl"] == 0.0


def _num_gated(folder: Path, number: int, metrics: dict[str, float]) -> int:
    """Groups below the floor, after a check that advantages are 0 in those whose rewards have a standard deviation
    below it, and in no other."""
    rows = list(read_explanations(folder / "completions" / f"step-{number:06d}.parquet", with_tokens=False))
    below = 0
    for start in range(0, len(rows), GROUP_SIZE):
        group = [row for row in rows[start : start + GROUP_SIZE] if row.reward is not None]
        is_below = stdev(row.reward for row in group if row.reward is not None) < metrics["noise_floor"]
        assert [row.advantage == 0.0 for row in group] == [is_below] * len(group)
        below += is_below
    assert metrics["groups_below_noise_floor"] == below
    return below
