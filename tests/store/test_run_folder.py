"""One folder holds one run: what it was configured as and ran on, and what resuming may change."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.store.run_folder import check_run_folder, git_commit, write_run_folder


def _config(**changes: object) -> TrainConfig:
    tree = {
        "output_dir": "runs/a",
        "teacher": {"model": "models/teacher"},
        "student": {"model": "models/student"},
        "data": {"path": "data"},
    }
    return TrainConfig.model_validate(tree | changes)


def test_the_papers_read_back_as_the_configuration(tmp_path: Path) -> None:
    config = _config(optimizer={"lr": 1e-6}, teacher={"model": "models/teacher", "layout": {"tp": 2, "sp": True}})
    check_run_folder(tmp_path, "train", config)
    write_run_folder(tmp_path, "train", config, world_size=2)
    assert load_config(TrainConfig, tmp_path / "config.yaml", []) == config
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "train"
    assert run["starts"][0]["world_size"] == 2
    assert run["starts"][0]["versions"]["torch"] == version("torch")
    check_run_folder(tmp_path, "train", config)
    write_run_folder(tmp_path, "train", config, world_size=4)
    assert [start["world_size"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [2, 4]


def test_a_run_that_was_begun_with_other_prompts_is_refused(tmp_path: Path) -> None:
    """Before `prompts.date` existed, the formats wrote other newlines: such a run cannot go on."""
    write_run_folder(tmp_path, "train", _config(), world_size=1)
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del tree["prompts"]["date"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"prompts\.date was None, now '2024-07-26'\. .*choose another output_dir"):
        check_run_folder(tmp_path, "train", _config())


def test_what_does_not_change_the_training_may_change(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "train", _config(), world_size=1)
    later = _config(
        num_steps=500,
        world_size=8,
        output_dir="elsewhere/a",
        teacher={"model": "models/teacher", "layout": {"tp": 4}, "recompute": "full"},
        checkpoint={"keep_last": 9},
        metrics={"tensorboard": False},
        rollout={"vllm": {"server": {"addresses": ["http://node7:8000"]}}},
    )
    check_run_folder(tmp_path, "train", later)


def test_a_supervised_run_may_begin_to_be_evaluated(tmp_path: Path) -> None:
    tree = {"output_dir": "runs/a", "model": {"model": "models/student"}, "data": {"path": "data"}}
    write_run_folder(tmp_path, "sft", SftConfig.model_validate(tree), world_size=1)
    check_run_folder(tmp_path, "sft", SftConfig.model_validate(tree | {"evaluation": {"data": "held_out"}}))


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "train", _config(), world_size=1)
    other = _config(seed=3, reward={"penalties": {"empty": -2.0}}, num_steps=7)
    with pytest.raises(ValueError, match="one run") as caught:
        check_run_folder(tmp_path, "train", other)
    message = str(caught.value)
    assert "reward.penalties.empty was 0.0, now -2.0; seed was 0, now 3. Put the values back" in message
    assert "num_steps" not in message


def test_another_command_is_refused(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft", _config(), world_size=1)
    with pytest.raises(ValueError, match="holds a run of `sft`, not of `train`"):
        check_run_folder(tmp_path, "train", _config())


def test_the_commit_is_that_of_the_repository_which_tracks_the_files(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.py").write_text("1")
    subprocess.run([*git, "add", "a.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"
    (tmp_path / "untracked").mkdir()
    assert git_commit(tmp_path / "untracked") is None
