"""`sbatch slurm/train_rlt.sbatch` on two nodes: disturbed in every way, it ends like a job that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.tiny_runs import outcome
from tests.slurm.jobs import Jobs

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
