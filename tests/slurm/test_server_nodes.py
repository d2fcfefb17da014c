"""What the job script does with SERVER_NODES: a stand-in runs in the place of ranks and servers, as the claim is the
script's alone. `test_vllm_servers.py` runs vLLM."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable

import pytest

from tests.slurm.jobs import Job, Jobs

pytestmark = pytest.mark.slurm

# Ranks end well once the test says so, and badly once the servers have failed.
_STAND_IN = """#!/bin/bash
case "$1 ${@: -1}" in
"serve --dry-run") echo would serve ;;
serve*)
    trap 'echo told >"$TOLD"; exit 0' TERM
    echo "$SLURMD_NODENAME $*" >>"$SEEN/serve"
    echo $$ >"$SEEN/pid"
    while :; do sleep 0.1; done ;;
train*)
    echo "$SLURMD_NODENAME $SLURM_PROCID of $SLURM_NTASKS, $RLT_SERVER_NODES $*" >>"$SEEN/ranks"
    until [ -e "$SEEN/go" ] || [ -s "$RLT_ATTEMPT_DIR/servers/failed" ]; do sleep 0.1; done
    [ -e "$SEEN/go" ] ;;
esac
"""


@pytest.fixture
def submit(jobs: Jobs) -> Callable[..., Job]:
    program = jobs.folder / "stand-in"
    program.write_text(_STAND_IN)
    program.chmod(0o755)

    def submit_on_three_nodes(run: str, **environment: str) -> Job:
        seen = jobs.folder / "seen"
        seen.mkdir(exist_ok=True)
        given = {"RLT_PROGRAM": str(program), "RLT_PREFLIGHT": "0", "RLT_MAX_FAILURES": "0", "SERVER_NODES": "1"}
        given |= {"SEEN": str(seen), "TOLD": str(seen / "told")} | environment
        return jobs.train(run, options=("--nodes=3",), **given)

    return submit_on_three_nodes


def _lines(job: Job, name: str, count: int) -> list[str]:
    """What the stand-ins have seen, once it is so many lines."""
    file = job.output.parent / "seen" / name
    job.cluster.wait_until(lambda: file.is_file() and file.read_text().count("\n") >= count, 60, f"{count} {name}")
    return sorted(file.read_text().splitlines())


def test_the_last_nodes_serve_the_first_ones_train_and_servers_end_with_the_ranks(
    submit: Callable[..., Job],
) -> None:
    job = submit("split")
    ranks, (server,) = _lines(job, "ranks", 4), _lines(job, "serve", 1)
    nodes = ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]
    assert [line.split(" train ")[0] for line in ranks] == [f"{node} {rank} of 4, 1" for rank, node in enumerate(nodes)]
    assert all(line.endswith(" world_size=4") for line in ranks)
    assert server.startswith("127.0.0.3 serve train ")
    assert server.endswith(" world_size=4")
    folder = job.run / "attempts" / f"{job.number}-0" / "servers"
    assert len((folder / "key").read_text()) == 64
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (job.output.parent / "seen" / "go").touch()
    assert job.wait().state == "COMPLETED", job.text()
    assert _lines(job, "told", 1) == ["told"]
    assert not (folder / "failed").exists()


def test_ranks_learn_that_servers_were_killed_and_the_job_ends(submit: Callable[..., Job]) -> None:
    job = submit("killed")
    _lines(job, "ranks", 4)
    (process,) = _lines(job, "pid", 1)
    os.kill(int(process), signal.SIGKILL)
    state = job.wait(seconds=60)
    assert (state.state, state.exit_code) == ("FAILED", 1), job.text()
    failed = job.run / "attempts" / f"{job.number}-0" / "servers" / "failed"
    assert failed.read_text().startswith("the step of vLLM's servers ended")


@pytest.mark.parametrize("given", ["3", "two"])
def test_ranks_need_a_node(submit: Callable[..., Job], given: str) -> None:
    job = submit("none-left", SERVER_NODES=given)
    state = job.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0), job.text()
    assert "SERVER_NODES must be a number below --nodes=3" in job.printed


def test_servers_for_a_configuration_without_them_are_bad_input(jobs: Jobs, submit: Callable[..., Job]) -> None:
    """The program itself says so, before any rank starts."""
    job = submit("useless", RLT_PROGRAM=str(jobs.program))
    state = job.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0), job.text()
    assert "SERVER_NODES: the configuration has no vLLM servers" in job.printed
    assert not list(job.run.glob("attempts/*/rank-*.log"))
