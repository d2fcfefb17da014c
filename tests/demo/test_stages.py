"""The demo's stages hang together, and its students differ in nothing but their explanations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rlt.config.commands.table import COMMANDS
from megatron_rlt.config.loading import load_config
from megatron_rlt.config.section import Section
from tools.demo.results import read_results
from tools.demo.run import run_demo
from tools.demo.stages import ABLATION, EXPERIMENT, OWN_RL, ablation, experiment
from tools.staged import Stage, side_by_side

SHORT_RL = (
    "num_steps=3",
    "grpo.questions_per_step=2",
    "grpo.group_size=2",
    "grpo.micro_batch_size=2",
    "rollout.max_completion_tokens=8",
    "optimizer.warmup_fraction=0",
)
# The whole demo in a minute: what is learned is of no matter, what is read and written is.
SHORT = {
    "prepare": (),
    "sft": ("num_steps=2", "global_batch_size=8", "micro_batch_size=4"),
    "train": SHORT_RL,
    "rlvr": SHORT_RL,
    "collect": ("rollout.max_completion_tokens=8",),
    "evaluate": ("sampling.max_completion_tokens=8",),
}


def _config(stage: Stage) -> Section:
    return load_config(COMMANDS[stage.command].config_class, stage.config, list(stage.overrides))


def test_every_stage_reads_only_what_stands_before_it() -> None:
    folder = Path("demo")
    there = {folder / "assets" / name for name in ("model", "train.jsonl", "held_out.jsonl")}
    for stage in experiment(folder, 0) + ablation(folder, 0):
        values = json.loads(_config(stage).model_dump_json())
        text = json.dumps({key: value for key, value in values.items() if key not in ("output_dir", "columns")})
        read = {Path(word) for word in text.replace('"', " ").split() if word.startswith("demo/")}
        read -= {folder / "shards"} if stage.command == "prepare" else set()
        assert read, stage.name
        assert read <= there, f"{stage.name} reads {read - there}"
        assert stage.result not in there, f"{stage.name} is done before it began"
        there.add(stage.result)


def test_stages_side_by_side_are_of_one_rank_and_read_nothing_of_each_other() -> None:
    groups = side_by_side(experiment(Path("demo"), 0) + ablation(Path("demo"), 0))
    together = [group for group in groups if len(group) > 1]
    collections, students = [2, 2], [len(EXPERIMENT), len(ABLATION)]
    evaluations = [2] * (len(EXPERIMENT) + len(ABLATION) + len(OWN_RL))
    assert sorted(map(len, together)) == sorted(collections + students + evaluations)
    for group in together:
        for stage in group:
            assert "world_size=1" in stage.overrides
            assert not any(str(other.result) in " ".join(stage.overrides) for other in group if other is not stage)


def test_students_differ_in_their_explanations_alone() -> None:
    stages = [s for s in experiment(Path("demo"), 1) + ablation(Path("demo"), 1) if s.name.startswith("student_")]
    configs = [json.loads(_config(stage).model_dump_json()) for stage in stages]
    assert len({config["data"].pop("path") for config in configs}) == 5
    assert len({config.pop("output_dir") for config in configs}) == 5
    assert all(config == configs[0] for config in configs)
    assert configs[0]["num_steps"] == 500


def test_lambda_is_all_that_the_ablation_changes_in_rl() -> None:
    stages = experiment(Path("demo"), 0) + ablation(Path("demo"), 0)
    runs = {s.name: _config(s) for s in stages if s.name.startswith("rlt")}
    with_kl, without = (runs[name].model_dump() for name in ("rlt", "rlt_lambda0"))
    assert (with_kl["reward"].pop("lambda_kl"), without["reward"].pop("lambda_kl")) == (6.0, 0.0)
    assert with_kl.pop("output_dir") != without.pop("output_dir")
    assert with_kl == without


@pytest.mark.slow
def test_the_whole_demo_runs_and_a_second_start_does_nothing(
    tmp_path: Path, preloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(preloaded))  # with which the demo starts its commands
    short = [replace(s, overrides=(*s.overrides, *SHORT[s.command])) for s in experiment(tmp_path, 0)]
    printed = StringIO()
    assert run_demo(tmp_path, short, seed=0, num_rows=16, console=Console(file=printed, width=120)) == 0
    results = read_results(tmp_path)
    assert list(results.students) == ["original", "warm", "rlt"]
    assert [len(student.loss) for student in results.students.values()] == [2, 2, 2]
    assert len(results.rl["rlt"].styles) == 3
    assert json.loads((tmp_path / "results.json").read_text())["students"]["rlt"]["answers"]["greedy"]["mean"] >= 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for traces in ("the noisy traces", "the warm teacher's", "the RL teacher's"):
        assert traces in printed.getvalue().split("Fresh students")[1]
    # From the same rows in the same order with the same weights, the first loss differs by the explanations alone.
    original, warm, _ = (student.loss[0] for student in results.students.values())
    assert original != warm

    seconds = (tmp_path / "stages.json").read_bytes()
    again = StringIO()
    assert run_demo(tmp_path, short, seed=0, num_rows=16, console=Console(file=again, width=120)) == 0
    assert again.getvalue().count("done before") == len(short)
    assert (tmp_path / "stages.json").read_bytes() == seconds
