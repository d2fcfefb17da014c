"""What `collect` refuses, each in one line and before a weight is loaded, and what it leaves as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.commands.collect import CollectConfig
from tests.jobs.tiny_collect import CollectInputs, collect_inputs, collect_on_ranks
from tests.jobs.tiny_scores import write_rows
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> CollectInputs:
    return collect_inputs(tmp_path_factory.mktemp("collect"))


def _refusals(configs: list[CollectConfig]) -> list[str]:
    """What each run says; one that works says nothing."""
    said = []
    for config in configs:
        try:
            collect_on_ranks(config)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_rows_of_another_run_are_neither_used_nor_overwritten(inputs: CollectInputs, tmp_path: Path) -> None:
    other_student = tmp_path / "student"
    shutil.copytree(inputs.student, other_student)
    config = json.loads((other_student / "config.json").read_text())
    (other_student / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    other_rows = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "question": "One?", "solution": "1"}])
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"seed": 6}, "samples holds rows of another run: seed was 5, now 6. Nothing is overwritten"),
        ({"temperature": 1.0}, "temperature was 0.7, now 1.0"),
        ({"num_explanations": 2}, "num_explanations was 3, now 2"),
        ({"rollout": {"max_completion_tokens": 25}}, "rollout.max_completion_tokens was 24, now 25"),
        ({"teacher": {"model": inputs.student, "dtype": "float32"}}, "content of teacher was "),
        ({"data": other_rows}, "content of data was "),
        ({"reward": {"alpha": 0.5}}, "explanations.parquet holds rows of another run: reward.alpha was 0.01, now 0.5"),
        ({"student": {"model": other_student, "dtype": "float32"}}, "content of student was "),
        ({"rollout": {"max_completion_tokens": 24, "max_batch_size": 2}, "selection": {"rule": "all"}}, ""),
    ]
    (said,) = run_ranks(_refusals, 1, [inputs.config(tmp_path, **changes) for changes, _ in cases])
    for (changes, expected), line in zip(cases, said, strict=True):
        assert expected in line, changes
        assert bool(expected) == bool(line), changes
        assert "\n" not in line


def test_a_folder_of_another_command_and_rows_that_cannot_be_used_are_refused(
    inputs: CollectInputs, tmp_path: Path
) -> None:
    (tmp_path / "taken" / "run").mkdir(parents=True)
    (tmp_path / "taken" / "run" / "run.json").write_text('{"command": "train", "starts": []}')
    special = {"id": "a", "question": "One<|im_end|>?", "solution": "1"}
    good = {"id": "b", "question": "Two?", "solution": "2"}
    files = {
        "empty": write_rows(tmp_path / "empty.jsonl", []),
        "bad": write_rows(tmp_path / "bad.jsonl", [b"nonsense", {"id": "a", "question": "One?"}]),
        "unusable": write_rows(tmp_path / "unusable.jsonl", [special]),
        "same": write_rows(tmp_path / "same.jsonl", [good, good | {"id": "c"}]),
        "some": write_rows(tmp_path / "some.jsonl", [special, good]),
    }
    configs = [
        inputs.config(tmp_path / "taken"),
        *(inputs.config(tmp_path / name, data=files[name]) for name in ("empty", "bad", "unusable")),
        inputs.config(tmp_path / "same", data=files["same"], control="other_question"),
        inputs.config(tmp_path / "some", data=files["some"]),
    ]
    (said,) = run_ranks(_refusals, 1, configs)

    assert f"{tmp_path}/taken/run holds a run of `train`, not of `collect`" in said[0]
    assert f"no usable row in {files['empty']}: it has no rows" in said[1]
    assert f"no usable row in {files['bad']}: all 2 rows were rejected (missing: 1, not_json: 1)" in said[2]
    assert "all 1 rows were rejected (unusable_prompt: 1)" in said[3]
    assert "special token '<|im_end|>'" in said[3]
    assert "control=other_question: needs two different questions, and all 2 rows ask the same one" in said[4]
    assert said[5] == ""
    assert not (tmp_path / "same" / "run" / "samples").exists()
    (rejected,) = (tmp_path / "some" / "run" / "rejected.jsonl").read_text().splitlines()
    assert (json.loads(rejected)["row"], json.loads(rejected)["reason"]) == (1, "unusable_prompt")
