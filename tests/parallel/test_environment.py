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
from megatron_rlt.parallel.environment import Place, first_host, given_place, torch_environment
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
