"""What the job scripts refuse by themselves, before anything of Slurm's is called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "rlt-x", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}


def _call(script: str, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Status and lines of a script that runs as if Slurm had started it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RLT_"))}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *words],
        env={**own, **JOB, "SLURM_SUBMIT_DIR": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert not done.stdout
    return done.returncode, done.stderr.splitlines()


def _configuration(folder: Path, text: str = "seed: 1\n") -> str:
    file = folder / "my run.yaml"
    file.write_bytes(text.encode())
    return str(file)


@pytest.mark.parametrize("script", ["sft.sbatch", "train_rlt.sbatch", "collect.sbatch", "evaluate.sbatch"])
@pytest.mark.parametrize("task", [{}, {"SLURM_ARRAY_TASK_ID": "1"}])
def test_a_configuration_that_lacks_is_one_line(script: str, task: dict[str, str], tmp_path: Path) -> None:
    each = ["--each", "data=a", "data=b"] if script == "evaluate.sbatch" else []
    none = _call(script, *each, **task)
    absent = _call(script, str(tmp_path / "no such.yaml"), *each, **task)
    bare = _call(script, _configuration(tmp_path), *each, **task)
    for (status, lines), fault in ((none, "no configuration given"), (absent, "no such"), (bare, "has no output_dir")):
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith("megatron-rlt: error: ")
        assert fault in lines[0]


@pytest.mark.parametrize("each", [["data=a", "data=b"], []])
def test_a_job_without_an_array_has_no_choice(each: list[str], tmp_path: Path) -> None:
    words = [_configuration(tmp_path), f"output_dir={tmp_path}/run", "--each", *each]
    status, lines = _call("evaluate.sbatch", *words)
    assert (status, len(lines)) == (2, 1)
    assert f"--each has {len(each)} choices, none for this task: give --array=0-" in lines[0]


@pytest.mark.parametrize("script", ["sft.sbatch", "convert.sbatch"])
@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ({"RLT_SITE": "/no/such/site.env"}, "RLT_SITE=/no/such/site.env: no such file"),
        ({"RLT_MAX_FAILURES": "none"}, "RLT_MAX_FAILURES=none: must be a whole number"),
        ({"RLT_END_TIME": "tomorrow 10:00"}, "RLT_END_TIME=tomorrow 10:00: must be seconds since the epoch"),
        ({"RLT_HOME": "/no/such/clone"}, "submit from the folder of the clone, or set RLT_HOME to it"),
    ],
)
def test_settings_that_cannot_hold_are_refused(script: str, setting: dict[str, str], fault: str) -> None:
    status, lines = _call(script, "x", **setting)
    assert status == 2
    assert fault in lines[-1]


def test_the_chain_is_not_submitted_with_other_settings_than_those_named() -> None:
    status, lines = _call("pipeline.sh", "x.yaml", RLT_SITE="/no/such/site.env")
    assert (status, len(lines)) == (2, 1)
    assert "RLT_SITE=/no/such/site.env: no such file" in lines[0]


@pytest.mark.parametrize(
    "line", ["output_dir: @\r\n", 'output_dir: "@"  # here\n', "output_dir: @   \n", "output_dir: '@'\r\n"]
)
def test_the_run_folder_is_read_as_the_program_reads_it(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "a#b c"
    configuration = _configuration(tmp_path, line.replace("@", str(folder)))
    _call("sft.sbatch", configuration, RLT_CONTAINER="other")  # which is refused, once the folder is there
    assert (folder / "attempts" / "7-0" / "ranks").is_dir()
