"""One cluster, one preloaded program and one set of inputs for all tests with a real Slurm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.tiny_runs import TinyInputs, tiny_inputs
from tests.slurm.cluster import Cluster, why_no_cluster
from tests.slurm.jobs import Jobs
from tests.slurm.program import program_for_tasks


@pytest.fixture(scope="session")
def slurm_inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=10)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes that have run a first step: a machine may lack or forbid what Slurm needs, and then says so here."""
    if (why := why_no_cluster()) is not None:
        pytest.skip(why)
    running = Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=3)
    try:
        running.__enter__()
        running.call("srun", "--nodes=3", "true")
    except (AssertionError, subprocess.TimeoutExpired) as error:
        running.kill()
        pytest.skip(f"Slurm does not run on this machine: {error}\n{running.logs()}")
    except BaseException:
        running.kill()
        raise
    yield running
    running.__exit__()


@pytest.fixture(scope="session")
def task_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with program_for_tasks(tmp_path_factory.mktemp("program")) as program:
        yield program


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path, slurm_inputs: TinyInputs, task_program: Path) -> Iterator[Jobs]:
    """The cluster with an empty queue before and after."""
    yield Jobs(cluster, tmp_path, slurm_inputs, task_program)
    cluster.clear()
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, slurm_inputs: TinyInputs, task_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a job that nobody disturbed."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"), slurm_inputs, task_program)
    job = jobs.train("whole")
    state = job.wait()
    assert (state.state, state.restarts) == ("COMPLETED", 0), job.text()
    return job.run
