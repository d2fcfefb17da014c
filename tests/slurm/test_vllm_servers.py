"""`SERVER_NODES=1 sbatch slurm/train_rlt.sbatch`: vLLM itself on a node of its own, lost and found again."""

from __future__ import annotations

import json
import stat
from importlib.util import find_spec
from pathlib import Path

import httpx2
import psutil
import pytest

from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.tiny_runs import TinyInputs, tiny_inputs
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, Jobs
from tests.vllm.server_plugin import PYTHONPATH
from tools.demo.make_assets import NUM_VLLM_HEADS

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: `make test-vllm`")]

_ON_SERVERS = (
    *("rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.vllm.kv_cache_bytes=33554432"),
    *("teacher.layout={tp: 2, sp: true}", "rollout.vllm.tp=1", "rollout.vllm.server.request_timeout_seconds=60"),
)
_NODES = ("--nodes=3", "--ntasks-per-node=1")
_SERVERS_NODE = "127.0.0.3"
_PATIENCE_SECONDS = 900.0  # a start of vLLM costs half a minute of one core, of which a crowded machine has few


@pytest.fixture(scope="module")
def vllm_inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("vllm-inputs"), num_rows=10, num_heads=NUM_VLLM_HEADS)


@pytest.fixture
def served(cluster: Cluster, jobs: Jobs, vllm_inputs: TinyInputs) -> Jobs:
    return Jobs(cluster, jobs.folder, vllm_inputs, jobs.program)


def _submit(jobs: Jobs, run: str, *settings: str, **environment: str) -> Job:
    return jobs.train(
        run, *_ON_SERVERS, *settings, options=_NODES, SERVER_NODES="1", PYTHONPATH=PYTHONPATH, **environment
    )


def _servers(job: Job) -> list[psutil.Process]:
    """vLLM's own processes on the servers' node, the first one first."""
    found = []
    for process in psutil.process_iter():
        try:
            is_of_job = process.environ().get("SLURM_JOB_ID") == job.number
            if is_of_job and "vllm.entrypoints.openai.api_server" in process.cmdline()[:3]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _assert_none_left(job: Job) -> None:
    """Slurm itself ends what a step leaves, a moment after the job."""
    job.cluster.wait_until(lambda: not _servers(job), 30, "no server")


def _assert_private(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("key", "node-0.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_a_killed_server_is_started_again_and_the_job_ends_well(served: Jobs) -> None:
    job = _submit(served, "served", "num_steps=4")
    job.wait_for_steps(1, seconds=_PATIENCE_SECONDS)
    folder = job.run / "attempts" / f"{job.number}-0" / "servers"
    _assert_private(folder)
    (first,) = json.loads((folder / "node-0.json").read_text())
    assert first["start"] == 1
    for path in ("/health", "/v1/models", "/weight_info"):
        assert httpx2.get(first["address"] + path, trust_env=False).status_code == 401, path
    (server,) = _servers(job)
    assert server.environ()["SLURMD_NODENAME"] == _SERVERS_NODE
    server.kill()

    state = job.wait(seconds=_PATIENCE_SECONDS)
    assert (state.state, state.restarts) == ("COMPLETED", 0), job.text()
    steps = read_metrics(job.run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert sum(step["engine_restarts"] for step in steps) == 1
    assert all(step["rollout_gap_max"] < 1e-4 for step in steps)
    (again,) = json.loads((folder / "node-0.json").read_text())
    assert again["start"] == 2
    _assert_none_left(job)


def test_a_server_that_is_never_ready_ends_the_job_and_is_named(served: Jobs) -> None:
    """It dies of no fault: a start simply takes longer than it may."""
    job = _submit(served, "late", "rollout.vllm.server.start_timeout_seconds=3", RLT_MAX_FAILURES="0")
    state = job.wait(seconds=_PATIENCE_SECONDS)
    assert (state.state, state.exit_code) == ("FAILED", 1), job.text()
    assert f"vLLM server 0 on {_SERVERS_NODE}, start 1, was not ready after 3 s" in job.printed, job.text()
    assert "failed first: rank " in job.printed  # all ranks learn of it at once
    _assert_none_left(job)


def test_a_server_that_does_not_start_ends_the_job_with_its_reason(served: Jobs) -> None:
    job = _submit(served, "too-large", "rollout.vllm.kv_cache_bytes=1125899906842624", RLT_MAX_FAILURES="0")
    state = job.wait(seconds=_PATIENCE_SECONDS)
    assert (state.state, state.exit_code) == ("FAILED", 1), job.text()
    assert f"vLLM server 0 on {_SERVERS_NODE}, start 1, ended while it started" in job.printed, job.text()
    assert "memory" in job.printed.lower()
