"""A run that was stopped and started again equals one that never stopped: bit for bit, or to rounding in a new layout.

Each case is one life on two ranks: the whole run, the same run stopped by SIGTERM half-way and started again with
everything rebuilt from disk, and copies of the stopped one resumed under other layouts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.store.explanations import read_explanations
from tests.distributed.tiny_runs import (
    ENDED_EARLY,
    SMALL_RL,
    SMALL_SFT,
    TinyInputs,
    copy_run,
    sft_here,
    train_here,
)
from tests.ranks import run_ranks
from tools.chaos.outcome import outcome

TP2, PP2, DP2 = "{tp: 2, sp: true}", "{pp: 2}", "{tp: 1}"
# A reference that counts and moves: at steps 2, 4 and 6, so also between the stop after step 3 and the end.
_REFERENCE = ["grpo.reference.beta=0.1", "grpo.reference.sync_steps=2"]
# Every step is saved while the next one runs; the optimizer in the parts in which the ranks hold it.
_BACKGROUND = ["checkpoint.interval_steps=1", "checkpoint.background=true", "checkpoint.reshardable=tp_pp"]
_TWO_UPDATES = ["grpo.updates_per_batch=2", "grpo.clip_low=0.2", "grpo.clip_high=0.2"]


def _layouts(teacher: str, student: str) -> list[str]:
    return [f"teacher.layout={teacher}", f"student.layout={student}"]


def _rl_life(folder: Path, settings: list[str], layouts: list[str], others: dict[str, list[str]]) -> list[int]:
    statuses = [
        train_here(folder / "whole", settings + layouts),
        train_here(folder / "stopped", settings + layouts, stop_after=3),
    ]
    for name, other in others.items():
        copy = copy_run(folder / "stopped", folder / name)
        statuses.append(train_here(copy, settings + other, stop_after=2))
    return [*statuses, train_here(folder / "stopped", settings + layouts)]


@pytest.mark.parametrize(
    ("teacher", "student", "extra", "others"),
    [
        (TP2, DP2, ["reward.kl_estimator=k3"], {"pp2": _layouts(PP2, TP2), "dp2": _layouts(DP2, PP2)}),
        (PP2, TP2, ["reward.kl_estimator=full", *_BACKGROUND], {}),
        (DP2, PP2, [*_TWO_UPDATES, "teacher.dtype=bfloat16", *_BACKGROUND], {}),
    ],
    ids=["tp2-sp", "pp2-background", "dp2-bf16-two-updates-background"],
)
def test_three_rl_steps_and_three_resumed_equal_six(
    tmp_path: Path, inputs: TinyInputs, teacher: str, student: str, extra: list[str], others: dict[str, list[str]]
) -> None:
    settings = [*SMALL_RL, *inputs.for_train, *_REFERENCE, *extra]
    for statuses in run_ranks(_rl_life, 2, tmp_path, settings, _layouts(teacher, student), others):
        assert statuses == [0, ENDED_EARLY, *(ENDED_EARLY for _ in others), 0]

    whole, stopped = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert [step["step"] for step in whole.metrics] == [1, 2, 3, 4, 5, 6]
    assert stopped.metrics == whole.metrics
    assert stopped.weights == whole.weights
    assert stopped.completions == whole.completions
    _require_real_training(whole.metrics)
    for name in others:
        _require_the_same_next_steps(tmp_path / name, tmp_path / "whole")


def _require_real_training(metrics: list[dict[str, Any]]) -> None:
    """Equality means something only if there is something to lose: moments, a reference that differs, rewards."""
    assert all(step["grad_norm"] > 0.01 and step["advantage_std"] > 0.5 for step in metrics)
    assert metrics[1]["kl_to_reference"] > 1e-4
    assert metrics[2]["kl_to_reference"] < metrics[1]["kl_to_reference"]  # mixed after step 2
    assert len({step["reward"] for step in metrics}) == 6
    assert all(math.isfinite(value) for step in metrics for value in step.values())


def _require_the_same_next_steps(resumed: Path, whole: Path) -> None:
    """Sums over ranks are taken in another order, so floats agree to rounding; what was sampled is the same."""
    expected, seen = outcome(whole).metrics[3:5], outcome(resumed).metrics[3:]
    assert len(seen) == 2
    for before, after in zip(expected, seen, strict=True):
        for name in ("loss", "reward", "r_ss", "r_kl", "entropy", "kl_to_reference"):
            assert after[name] == pytest.approx(before[name], abs=1e-5), name
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
        file = Path("completions") / f"step-{before['step']:06d}.parquet"
        rows = zip(*(read_explanations(run / file, with_tokens=True) for run in (whole, resumed)), strict=True)
        assert all(old.completion_ids.tolist() == new.completion_ids.tolist() for old, new in rows)


def _sft_life(folder: Path, settings: list[str]) -> list[int]:
    dp2, tp2 = [*settings, f"model.layout={DP2}"], [*settings, f"model.layout={TP2}"]
    statuses = [sft_here(folder / "whole", dp2), sft_here(folder / "stopped", dp2, stop_after=2)]
    copy_run(folder / "stopped", folder / "tp2")
    return [*statuses, sft_here(folder / "stopped", dp2), sft_here(folder / "tp2", tp2)]


def test_two_sft_steps_and_two_resumed_equal_four(tmp_path: Path, inputs: TinyInputs) -> None:
    for statuses in run_ranks(_sft_life, 2, tmp_path, [*SMALL_SFT, *inputs.for_sft]):
        assert statuses == [0, ENDED_EARLY, 0, 0]

    whole, stopped = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert [step["step"] for step in whole.metrics] == [1, 2, 3, 4]
    assert stopped == whole
    in_tp2 = outcome(tmp_path / "tp2").metrics
    assert [step["loss"] for step in in_tp2] == pytest.approx([step["loss"] for step in whole.metrics], abs=1e-5)


def _prolonged_life(folder: Path, settings: list[str]) -> list[int]:
    prolonged = [*settings, "num_steps=2"]
    statuses = [sft_here(folder / "whole", prolonged), sft_here(folder / "prolonged", [*settings, "num_steps=1"])]
    # As if killed between the last checkpoint and the export.
    statuses.append(sft_here(folder / "prolonged", [*prolonged, "checkpoint.export=[]"]))
    copy_run(folder / "prolonged", folder / "not_exported")
    return [*statuses, sft_here(folder / "prolonged", prolonged)]


def test_a_prolonged_run_never_leaves_the_weights_of_fewer_steps_as_final_ones(
    tmp_path: Path, inputs: TinyInputs
) -> None:
    settings = [*SMALL_SFT, *inputs.for_sft, "optimizer.schedule=constant", "optimizer.min_lr=0"]
    for statuses in run_ranks(_prolonged_life, 2, tmp_path, settings):
        assert statuses == [0, 0, 0, 0]
    assert not (tmp_path / "not_exported" / "hf").exists()
    assert outcome(tmp_path / "prolonged") == outcome(tmp_path / "whole")
