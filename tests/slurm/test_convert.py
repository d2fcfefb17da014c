"""`slurm/convert.sbatch`: one task converts, and its status is the job's."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.jobs import Job, Jobs


def _submit(jobs: Jobs, name: str, *arguments: str | Path) -> Job:
    output = jobs.folder / f"{name}.out"
    number = jobs.cluster.call(
        *("sbatch", "--parsable", f"--output={output}", "--cpus-per-task=2", "--mem=0", "--time=10"),
        *("slurm/convert.sbatch", *map(str, arguments)),
        env={"RLT_PROGRAM": str(jobs.program), "RLT_SITE": "/dev/null"},
    )
    return Job(jobs.cluster, number, jobs.folder / name, output)


def test_a_job_converts_once_and_bad_input_ends_it_for_good(jobs: Jobs) -> None:
    target = jobs.folder / "nemo"
    job = _submit(jobs, "first", jobs.inputs.model, target, "--to", "nemo")
    state = job.wait()
    assert (state.state, state.exit_code) == ("COMPLETED", 0), job.text()
    assert json.loads((target / "conversion.json").read_text())["target"]["kind"] == "nemo"
    again = _submit(jobs, "again", jobs.inputs.model, target, "--to", "nemo")
    state = again.wait()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 2, 0), again.text()
    assert "exists, and nothing is overwritten" in again.printed
