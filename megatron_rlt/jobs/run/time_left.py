"""Whether another step fits before Slurm's time limit: by the slowest step and save so far, also of earlier starts.

What was measured is kept in the run folder, so that the first step of the next start is judged, too.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_rlt.whole_files import write_text

LEAD_FILE = "lead_time.json"
_MARGIN_SECONDS = 20.0  # the end of all ranks, and a step or a save that is slower than all before
_MARGIN_SHARE = 0.1


class TimeLeft:
    """The time that steps and saves of one run take, against the end of its job."""

    def __init__(self, folder: Path, *, end: float | None, is_writer: bool) -> None:
        """`folder`: of the run. `end`: of the job, in seconds since the epoch; None: there is none."""
        self._file, self._end, self._is_writer = folder / LEAD_FILE, end, is_writer
        self._slowest = {"step_seconds": 0.0, "save_seconds": 0.0}
        if self._file.is_file():
            self._slowest |= json.loads(self._file.read_text(encoding="utf-8"))

    def lead_seconds(self, *, num_saves: int) -> float:
        """How long before the end a step must begin at the latest, if so many saves end after it."""
        slowest = self._slowest["step_seconds"] + num_saves * self._slowest["save_seconds"]
        return slowest * (1 + _MARGIN_SHARE) + _MARGIN_SECONDS

    def measure_step(self, seconds: float) -> None:
        """Count a step or part that took so long."""
        self._measure("step_seconds", seconds)

    def measure_save(self, seconds: float) -> None:
        """Count a save that took so long."""
        self._measure("save_seconds", seconds)

    def is_over(self, *, num_saves: int) -> bool:
        """Whether a step that begins now, and so many saves, may last until after the job's end."""
        return self._end is not None and time.time() + self.lead_seconds(num_saves=num_saves) > self._end

    def _measure(self, name: str, seconds: float) -> None:
        if seconds > self._slowest[name]:
            self._slowest[name] = seconds
            if self._is_writer and self._end is not None:
                write_text(self._file, json.dumps(self._slowest))
