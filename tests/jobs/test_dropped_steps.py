"""A `train` whose student gives no number drops every completion, changes no weight, and stops after a few steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_rlt.types import StoppedError
from tests.distributed.tiny_runs import TinyInputs, tiny_inputs
from tests.jobs.tiny_steps import tiny_steps
from tests.ranks import run_ranks


def overflowing(model: Path, folder: Path) -> Path:
    """The model with weights that are finite and give logits that are not."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def steps_until_stop(inputs: TinyInputs, folder: Path) -> tuple[list[set[str | None]], bool, str]:
    student = overflowing(inputs.model, folder / "student")
    steps = tiny_steps(inputs, folder / "run", f"student.model={student}", "optimizer.max_skipped_steps=3")
    policy = steps.context.learner.policy
    before = [parameter.detach().clone() for parameter in policy.model.parameters()]
    reasons = []
    try:
        for number in range(9):
            taken = steps.take(number)
            assert all(update.skipped for update in taken.updates)
            reasons.append({one.combined.dropped for one in taken.completions})
    except StoppedError as stopped:
        same = all(torch.equal(was, now) for was, now in zip(before, policy.model.parameters(), strict=True))
        return reasons, same, str(stopped)
    return reasons, False, "did not stop"


def test_steps_without_any_reward_stop_the_run(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, num_rows=4)
    ((reasons, is_unchanged, said),) = run_ranks(steps_until_stop, 1, inputs, tmp_path)
    assert len(reasons) == 2  # the third update in a row without effect ends it
    for step in reasons:
        assert None not in step
        assert any("non-finite" in str(reason) for reason in step)
    assert is_unchanged
    assert said.startswith("3 updates in a row changed nothing (optimizer.max_skipped_steps=3)")
    assert "no completion was in the loss" in said
