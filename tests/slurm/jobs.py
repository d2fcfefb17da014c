"""Jobs of the shipped scripts with tiny models on CPU ranks: two nodes with two ranks each."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.metrics.writer import read_metrics
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, TinyInputs
from tests.slurm.cluster import Cluster, JobState

# The teacher's tensor parallelism lies across the nodes: with two ranks a node, TP4 spans both.
LAYOUTS = ("teacher.layout={tp: 4, sp: true}", "student.layout={tp: 1}")


@dataclass
class Jobs:
    """Submits jobs to a cluster; what they print lies in `folder`."""

    cluster: Cluster
    folder: Path
    inputs: TinyInputs
    program: Path

    def train(self, run: str, *settings: str, options: tuple[str, ...] = (), **environment: str) -> Job:
        """`sbatch slurm/train_rlt.sbatch` on the demo's configuration."""
        keys = [*SMALL_RL, *self.inputs.for_train, *LAYOUTS, *settings]
        return self.submit("train_rlt", RL_CONFIG, run, *keys, options=options, **environment)

    def submit(
        self, script: str, config: Path, run: str, *settings: str, options: tuple[str, ...] = (), **environment: str
    ) -> Job:
        """Submit one of the scripts, unchanged."""
        sizes = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=30")
        output = self.folder / f"{run}.out"
        job = self.cluster.call(
            *("sbatch", "--parsable", f"--output={output}", *sizes, *options),
            *(f"slurm/{script}.sbatch", str(config), *settings, f"output_dir={self.folder / run}"),
            env={"RLT_PROGRAM": str(self.program), "RLT_SITE": "/dev/null", **environment},
        )
        return Job(self.cluster, job, self.folder / run, output)


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    cluster: Cluster
    number: str
    run: Path
    output: Path

    def wait(self, *states: str, seconds: float = 120) -> JobState:
        """Wait for its end, or one of these states."""
        try:
            return self.cluster.wait(self.number, *states, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from error

    def wait_for_steps(self, count: int, seconds: float = 90) -> None:
        """Wait until metrics.jsonl has so many steps."""
        deadline = time.monotonic() + seconds
        while len(read_metrics(self.run)) < count:
            state = self.cluster.job(self.number).state
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{self.text()}"
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def wait_for_rank(self, rank: int, *, attempt: int) -> None:
        """Wait until a rank of this start, counted from 0, listens to signals, and its attempt holds the run."""
        folder = self.run / "attempts" / f"{self.number}-{attempt}"
        self.cluster.wait_until(
            lambda: (
                (folder / "ranks" / f"listens-{rank}").is_file()
                and (self.run / "attempts" / "latest").resolve() == folder
            ),
            60,
            f"rank {rank} of start {attempt}",
        )

    def kill_rank(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a rank's process a signal."""
        file = self.run / "attempts" / "latest" / "ranks" / f"listens-{rank}"
        os.kill(int(file.read_text().split()[0]), number)

    def text(self) -> str:
        """What the job script and the first rank printed."""
        logs = sorted(self.run.glob("attempts/*/rank-*.log"))
        parts = [self.output, *logs]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in parts if file.is_file())

    @property
    def printed(self) -> str:
        """What the job script printed."""
        return self.output.read_text()
