"""How far a run ever came, over all its attempts on a cluster: a failure after new steps is no failure in a row."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.parallel.environment import attempt_folder
from megatron_rlt.whole_files import make_folder, temporary_beside, write_text

ATTEMPTS = "attempts"
"""Folder in the run folder, with one folder per attempt and the files of `Progress`."""
LATEST = "latest"
"""Link in that folder to the last attempt that held the run's lock."""
_FURTHEST, _FAILURES = "furthest_step", "failures_in_a_row"


class Progress:
    """Two numbers in the run folder. The job scripts count failures up; a step that no attempt finished before ends
    the count."""

    def __init__(self, run_folder: Path) -> None:
        self._furthest, self._failures = (run_folder / ATTEMPTS / name for name in (_FURTHEST, _FAILURES))
        make_folder(run_folder / ATTEMPTS)

    def furthest_step(self) -> int:
        """The last step or part that any attempt finished; 0: none."""
        return int(self._furthest.read_text(encoding="utf-8")) if self._furthest.is_file() else 0

    def finish_step(self, number: int) -> None:
        """Record a finished step or part, counted from 1."""
        if number > self.furthest_step():
            write_text(self._furthest, f"{number}\n")
            self._failures.unlink(missing_ok=True)


def link_latest_attempt(run_folder: Path) -> None:
    """Let `attempts/latest` point to this attempt, if a job script of `slurm/` started it. For the lock's holder."""
    attempt = attempt_folder()
    if attempt is None:
        return
    link = run_folder / ATTEMPTS / LATEST
    new = temporary_beside(link)
    new.symlink_to(attempt.name)
    new.replace(link)
