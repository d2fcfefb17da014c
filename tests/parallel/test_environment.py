"""Where a process finds its rank and its peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.launch.launch import run_job
from megatron_rlt.parallel.environment import Place, first_host, given_place, job_end, torch_environment
from megatron_rlt.parallel.fp8_support import prepare_fp8
from tests.parallel.launched_jobs import counts_ranks

_SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher in sight."""
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    return monkeypatch


def _set(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def test_without_a_launcher_there_is_no_place(environment: pytest.MonkeyPatch) -> None:
    assert given_place() is None


def test_torchrun_gives_rank_and_local_rank(environment: pytest.MonkeyPatch) -> None:
    _set(environment, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert given_place() == Place(3, 4, 1, "torchrun")


def test_srun_gives_the_place_in_its_step_and_a_meeting_point(environment: pytest.MonkeyPatch) -> None:
    _set(environment, _SRUN)
    place = given_place()
    assert place == Place(5, 8, 1, "srun")
    with torch_environment(place):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]
        # 7 x job 4711 + step 1 = 32,978; modulo 12,000 = 8,978; from 20,000 on
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "28978")
    assert "RANK" not in os.environ
    _set(environment, {"MASTER_ADDR": "head", "MASTER_PORT": "29501"})
    with torch_environment(place):
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("head", "29501")


def test_a_batch_script_and_a_step_of_one_task_start_their_own_ranks(environment: pytest.MonkeyPatch) -> None:
    _set(environment, _SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert given_place() is None
    environment.delenv("SLURM_STEP_ID")
    environment.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert given_place() is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("node1", "node1"),
        ("a-1,b-2", "a-1"),
        ("rack[3]-node2", "rack3-node2"),
        ("n[0-1].cluster,x", "n0.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_another_number_of_ranks_than_the_launchers_is_refused(environment: pytest.MonkeyPatch) -> None:
    _set(environment, {"RANK": "0", "WORLD_SIZE": "2"})
    settings = JobConfig.model_validate({"output_dir": "run", "world_size": 4})
    message = "world_size=4 but torchrun started 2 ranks; set world_size=2 or start 4"
    with pytest.raises(ValueError, match=message):
        run_job(counts_ranks, settings, settings.world_size)


_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


def test_transformer_engine_gets_the_scales_of_the_jobs_blockwise_models(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(_SCALES, "unset")
    plain, mxfp8 = ModelConfig(model=Path("m")), ModelConfig(model=Path("m"), fp8=Fp8Config(recipe="mxfp8"))
    prepare_fp8({"teacher": plain, "student": mxfp8})
    assert os.environ[_SCALES] == "unset"
    for scales, value in (("float32", "1"), ("power_of_two", "0")):
        blockwise = ModelConfig(model=Path("m"), fp8=Fp8Config(scales=scales))  # type: ignore[arg-type]
        prepare_fp8({"teacher": plain, "student": mxfp8, "students.extra.other": blockwise})
        assert os.environ[_SCALES] == value


def test_nothing_imports_megatron_before_the_scales_are_set() -> None:
    """Transformer Engine, which Megatron imports, reads them at import; the job itself is imported afterwards."""
    program = (
        "import sys, megatron_rlt.__main__, megatron_rlt.cli, megatron_rlt.launch.launch;"
        "sys.exit(any(name.startswith(('megatron.', 'transformer_engine')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


_NOT_A_NUMBER = ("x", "", "-1", "1.5", "0x1", "9" * 30, "1 2")


@pytest.mark.parametrize("text", _NOT_A_NUMBER)
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_variable_of_torchruns_that_is_no_number_is_named(
    name: str, text: str, environment: pytest.MonkeyPatch
) -> None:
    _set(environment, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: text})
    with pytest.raises(ValueError, match=f"^environment variable {name}='{text}': must be a whole number from"):
        given_place()


def test_the_end_of_a_job_is_seconds_or_named(environment: pytest.MonkeyPatch) -> None:
    for text, seconds in (("1764288000", 1764288000.0), ("", None)):
        environment.setenv("SLURM_JOB_END_TIME", text)
        assert job_end() == seconds
    for text in ("abc", "nan", "2026-11-28", "-1"):
        environment.setenv("SLURM_JOB_END_TIME", text)
        with pytest.raises(ValueError, match=f"^environment variable SLURM_JOB_END_TIME='{text}': must be a whole"):
            job_end()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"])
def test_a_variable_of_sruns_that_is_no_number_or_absent_is_named(name: str, environment: pytest.MonkeyPatch) -> None:
    _set(environment, _SRUN | {name: "four"})
    with pytest.raises(ValueError, match=f"environment variable {name}='four'"):
        given_place()
    environment.delenv("SLURM_NTASKS")
    environment.delenv(name)
    if name == "SLURM_PROCID":  # no step of srun's
        assert given_place() is None
        return
    missing = "SLURM_NTASKS" if name == "SLURM_STEP_NUM_TASKS" else name
    with pytest.raises(ValueError, match=f"environment variable {missing} is not set"):
        given_place()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0': must be a whole number from 1 on"),
        (_SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8: must be below SLURM_STEP_NUM_TASKS=8"),
    ],
)
def test_a_rank_outside_the_job_is_named(changes: dict[str, str], named: str, environment: pytest.MonkeyPatch) -> None:
    _set(environment, changes)
    with pytest.raises(ValueError, match=named):
        given_place()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MASTER_ADDR": "head", "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0': must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({"SLURM_JOB_ID": "4711_3"}, "SLURM_JOB_ID='4711_3'"),
        ({"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID='batch'"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": ",,"}, "names no host"),
    ],
)
def test_a_meeting_point_that_cannot_be_found_is_named(
    changes: dict[str, str], named: str, environment: pytest.MonkeyPatch
) -> None:
    _set(environment, _SRUN | changes)
    with pytest.raises(ValueError, match=named), torch_environment(Place(5, 8, 1, "srun")):
        pass
