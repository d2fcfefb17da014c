"""`sbatch slurm/train_rlt.sbatch` on two nodes: disturbed in every way, it ends like a job that nobody disturbed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from megatron_rlt.cluster.status import status_lines
from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.commands import half_written
from tests.distributed.tiny_runs import SMALL_SFT, WARMUP_CONFIG
from tests.slurm.cluster import ROOT
from tests.slurm.jobs import Jobs
from tools.chaos.outcome import outcome

pytestmark = pytest.mark.slurm


def test_a_signal_before_the_time_limit_saves_requeues_and_ends_bit_equal(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.train("signalled")
    job.wait_for_steps(2)
    job.cluster.call("scancel", "--signal=USR1", "--batch", job.number)  # what --signal=B:USR1 does at its time
    state = job.wait()
    assert (state.state, state.restarts) == ("COMPLETED", 1), job.text()
    assert "saved and ended early: back into the queue" in job.printed
    assert outcome(job.run) == outcome(undisturbed)
    assert sorted(path.name for path in (job.run / "attempts").glob("*-*")) == [f"{job.number}-0", f"{job.number}-1"]
    assert (job.run / "attempts" / "latest").readlink() == Path(f"{job.number}-1")


@pytest.mark.full
def test_slurms_own_signal_before_the_limit_saves_and_requeues(jobs: Jobs) -> None:
    """It comes a minute before a limit of two, in Slurm's ticks of half a minute."""
    job = jobs.train("limit", "num_steps=2000", options=("--time=2", "--signal=B:USR1@60"))
    job.wait_for_steps(1)
    job.wait("PENDING", "FAILED", "TIMEOUT", "COMPLETED")
    assert "asked the ranks to save and end" in job.printed
    assert "saved and ended early: back into the queue" in job.printed
    job.cluster.call("scancel", job.number)


def test_a_job_saves_by_the_clock_where_nobody_tells_it(jobs: Jobs, undisturbed: Path) -> None:
    """The limit is 20 seconds of margin and a few seconds away: it saves after a step or two."""
    job = jobs.train("clock", RLT_END_TIME=str(int(time.time()) + 27))
    job.wait_for_steps(1)
    job.wait("PENDING", "FAILED", "COMPLETED")
    assert "saved and ended early" in job.printed
    assert "asked the ranks" not in job.printed
    lead = json.loads((job.run / "lead_time.json").read_text())
    steps = read_metrics(job.run)
    assert 0 < len(steps) < 6
    slowest = max(sum(value for name, value in step.items() if name.startswith("seconds/")) for step in steps)
    assert lead["step_seconds"] >= 0.5 * slowest
    assert lead["save_seconds"] > 0
    job.cluster.call("scancel", job.number)
    assert jobs.train("clock").wait().state == "COMPLETED"
    assert outcome(job.run) == outcome(undisturbed)


def test_a_killed_rank_ends_the_job_within_seconds_and_is_named(jobs: Jobs) -> None:
    """With nothing finished in between, the second failure in a row is not requeued when one is allowed."""
    job = jobs.train("killed", "num_steps=100", RLT_MAX_FAILURES="1")
    job.wait_for_steps(1)
    job.kill_rank(2)
    killed = time.monotonic()
    job.wait("PENDING", "FAILED", seconds=30)
    assert time.monotonic() - killed < 25
    assert "failed first: rank 2 on 127.0.0.2" in job.printed, job.text()
    assert "killed by a signal from outside" in job.printed
    assert "at most 1 times in a row without a new finished step, this is 1" in job.printed
    # The next start is killed before it comes further than the first.
    (job.run / "attempts" / "furthest_step").write_text("99\n")
    job.wait("RUNNING")
    job.wait_for_rank(1, attempt=1)
    job.kill_rank(1)
    state = job.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 1, 1), job.text()
    assert "failed, 2 times in a row without a new finished step: not requeued" in job.printed


def test_a_lost_node_is_replaced_and_the_run_ends_bit_equal(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.train("lost", "checkpoint.interval_steps=2")
    job.wait_for_steps(3)
    job.cluster.crash("127.0.0.2")
    state = job.wait(seconds=180)
    assert (state.state, state.restarts) == ("COMPLETED", 1), job.text()
    assert "127.0.0.[1,3]" in job.printed
    assert outcome(job.run) == outcome(undisturbed)


def test_a_node_lost_in_the_middle_of_a_save_leaves_the_save_before(jobs: Jobs, undisturbed: Path) -> None:
    """The node of a rank that writes; every step saves, so some save is under way at almost any time."""
    job = jobs.train("lost-in-save", "checkpoint.interval_steps=1")
    job.wait_for_steps(2)
    job.cluster.wait_until(lambda: bool(half_written(job.run)), 60, "a save")
    job.cluster.crash("127.0.0.2")
    state = job.wait(seconds=180)
    assert (state.state, state.restarts) == ("COMPLETED", 1), job.text()
    assert outcome(job.run) == outcome(undisturbed)


def test_a_hanging_rank_is_named_by_the_watchdog(jobs: Jobs) -> None:
    job = jobs.train("hanging", "num_steps=100", "watchdog.timeout_seconds=6", RLT_MAX_FAILURES="0")
    job.wait_for_steps(1)
    job.kill_rank(3, signal.SIGSTOP)
    state = job.wait(seconds=90)
    assert (state.state, state.exit_code) == ("FAILED", 1), job.text()
    assert "failed first: rank 3 on 127.0.0.2" in job.printed, job.text()
    assert "no sign of life for" in job.printed


def test_a_second_job_on_the_folder_is_refused_and_the_first_goes_on(jobs: Jobs) -> None:
    tp2 = "teacher.layout={tp: 2, sp: true}"
    first = jobs.train("shared", tp2, "num_steps=200", options=("--nodes=1",))
    first.wait_for_steps(1)
    second = jobs.train(
        "shared", tp2, "num_steps=200", options=("--nodes=1", "--job-name=second", f"--output={jobs.folder}/second.out")
    )
    state = second.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0)
    assert "is being written by another start" in second.text()
    steps = len(read_metrics(first.run))
    first.wait_for_steps(steps + 1)
    assert first.cluster.job(first.number).state == "RUNNING"
    assert (first.run / "attempts" / "latest").readlink() == Path(f"{first.number}-0")


def test_a_preempted_job_saves_and_continues_bit_equal(jobs: Jobs, undisturbed: Path) -> None:
    job = jobs.train("preempted")
    job.wait_for_steps(2)
    urgent = job.cluster.call(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    )
    assert job.cluster.wait(urgent).state == "COMPLETED"
    state = job.wait()
    assert (state.state, state.restarts) == ("COMPLETED", 1), job.text()
    assert "saved step" in (job.run / "attempts" / f"{job.number}-0" / "rank-0.log").read_text()
    assert outcome(job.run) == outcome(undisturbed)


def test_bad_input_ends_a_job_for_good(jobs: Jobs) -> None:
    job = jobs.train("bad", "teacher.layout.tp=3")
    state = job.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0), job.text()
    assert "teacher.layout" in job.text()


def test_a_cancelled_job_does_not_come_back(jobs: Jobs) -> None:
    job = jobs.train("cancelled")
    job.wait_for_steps(1)
    job.cluster.call("scancel", job.number)
    assert job.wait("CANCELLED", "COMPLETED", "FAILED").state == "CANCELLED"
    time.sleep(2)
    state = job.cluster.job(job.number)
    assert (state.state, state.restarts) == ("CANCELLED", 0)


def test_a_bad_node_is_left_out_of_the_next_start(jobs: Jobs) -> None:
    """A node with other software: here, another version of a package that only it sees."""
    program = jobs.folder / "odd"
    program.write_text(f"""#!/bin/bash
if [ "$SLURMD_NODENAME" = 127.0.0.2 ] && [ "$1" = doctor ]; then export RLT_TEST_ODD=1; fi
exec {jobs.program} "$@"
""")
    program.chmod(0o755)
    job = jobs.train("odd-node", "num_steps=1", RLT_PROGRAM=str(program))
    state = job.wait()
    assert "bad node 127.0.0.2: transformers is 0.0" in job.printed, job.text()
    assert (state.state, state.restarts, state.exclude) == ("COMPLETED", 1, "127.0.0.2"), job.text()
    assert "127.0.0.[1,3]" in job.printed


def test_the_installed_command_runs_as_a_user_starts_it(jobs: Jobs) -> None:
    """Everything else is forked from a preloaded program; this is the clone's own."""
    program = ROOT / ".venv" / "bin" / "megatron-rlt"
    keys = [*SMALL_SFT, *jobs.inputs.for_sft, "num_steps=2"]
    job = jobs.submit("sft", WARMUP_CONFIG, "installed", *keys, options=("--nodes=1",), RLT_PROGRAM=str(program))
    assert job.wait(seconds=240).state == "COMPLETED", job.text()
    assert (job.run / "hf").is_dir()


def test_what_a_job_tells_of_itself(undisturbed: Path) -> None:
    """One log a rank, the network of each node, and `status` from the folder alone."""
    attempt = undisturbed / "attempts" / "latest"
    assert sorted(path.name for path in attempt.glob("rank-*.log")) == [f"rank-{rank}.log" for rank in range(4)]
    for first_rank, node in ((0, "127.0.0.1"), (2, "127.0.0.2")):
        log = (attempt / f"rank-{first_rank}.log").read_text()
        assert f"network of {node}: MASTER_ADDR=127.0.0.1, MASTER_PORT=2" in log
        assert "GLOO_SOCKET_IFNAME=lo" in log
    lines = status_lines(undisturbed, now=time.time())
    assert any(line.startswith("step: 6 of 6, ") for line in lines)
    assert "ranks: 4 started, 4 ended well, 0 failed, 0 not ended" in lines
    doctor = (attempt / "doctor.log").read_text()
    assert "nodes: 2 (127.0.0.1, 127.0.0.2), 4 ranks" in doctor
    assert "bad node" not in doctor
