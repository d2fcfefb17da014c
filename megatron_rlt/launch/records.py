"""What ranks tell those who watch them: small files in a folder, readable after any death.

For ranks of one machine it is a private folder of their launcher; in a job on a cluster it lies in the attempt's
folder, which all nodes see.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.launch.failures import Failure, read_failures, write_failure
from megatron_rlt.parallel.environment import attempt_folder, job_step, node_name
from megatron_rlt.whole_files import make_folder

RANKS = "ranks"
"""Folder of the records in an attempt's folder."""


@dataclass(frozen=True)
class Records:
    """The files of all ranks. Each rank writes its own; the launcher reads them."""

    folder: Path

    @property
    def meeting_file(self) -> Path:
        """Through which the ranks find each other."""
        return self.folder / "store"

    def mark_phase(self, rank: int, phase: str) -> None:
        """Record a rank's new phase, so that it is known even if the rank is killed."""
        self._phase(rank).write_text(phase, encoding="utf-8")

    def mark_alive(self, rank: int) -> None:
        """Record a sign of life. Never raises: the watchdog that calls it must go on."""
        with suppress(OSError):
            self._sign(rank).touch()

    def mark_done(self, rank: int) -> None:
        """Record that a rank's job returned: its exit is no failure."""
        self._done(rank).touch()

    def mark_place(self, rank: int) -> None:
        """Record on which node a rank runs."""
        self._host(rank).write_text(node_name(), encoding="utf-8")

    def mark_listening(self, rank: int) -> None:
        """Record that a rank's process may be sent signals from now on: its id, the id's name space, Slurm's step."""
        name_space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
        (self.folder / f"listens-{rank}").write_text(f"{os.getpid()} {name_space} {job_step()}\n", encoding="utf-8")

    def mark_status(self, rank: int, status: int) -> None:
        """Record the status with which a rank's job ended."""
        (self.folder / f"status-{rank}").write_text(f"{status}\n", encoding="utf-8")

    def write_failure(self, failure: Failure) -> None:
        """Record how a rank failed."""
        write_failure(failure, self.folder)

    def failures(self) -> dict[int, Failure]:
        """The failures that ranks recorded themselves, by rank."""
        return {failure.rank: failure for failure in read_failures(self.folder)}

    def phase(self, rank: int) -> str:
        """The phase that the rank recorded last."""
        file = self._phase(rank)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else "start"

    def host(self, rank: int) -> str:
        """Where the rank runs; empty if it said nothing."""
        file = self._host(rank)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def last_sign(self, rank: int) -> float | None:
        """When the rank gave its last sign of life, in seconds since the epoch; None before the first."""
        file = self._sign(rank)
        return file.stat().st_mtime if file.exists() else None

    def is_done(self, rank: int) -> bool:
        """Whether the rank's job returned."""
        return self._done(rank).exists()

    def _host(self, rank: int) -> Path:
        return self.folder / f"host-{rank}"

    def _phase(self, rank: int) -> Path:
        return self.folder / f"phase-{rank}"

    def _sign(self, rank: int) -> Path:
        return self.folder / f"alive-{rank}"

    def _done(self, rank: int) -> Path:
        return self.folder / f"done-{rank}"


def attempt_records(run_folder: Path) -> Records | None:
    """The records of this attempt, where a script of `slurm/` started the rank.

    Raises ValueError if the script took another folder for the run's.
    """
    folder = attempt_folder()
    if folder is None:
        return None
    if not folder.resolve().is_relative_to(run_folder.resolve()):
        raise ValueError(
            f"output_dir={run_folder}: the job script reads it in the configuration as {folder.parents[1]}; write"
            " output_dir as one plain line `output_dir: FOLDER`, or give it as output_dir=FOLDER"
        )
    make_folder(folder / RANKS)
    return Records(folder / RANKS)
