"""What the ranks of one machine tell their launcher: small files in a private folder, readable after any death."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.launch.failures import Failure, read_failures, write_failure


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

    def write_failure(self, failure: Failure) -> None:
        """Record how a rank failed."""
        write_failure(failure, self.folder)

    def failures(self) -> dict[int, Failure]:
        """The failures that ranks recorded themselves, by rank."""
        return {failure.rank: failure for failure in read_failures(self.folder)}

    def phase(self, rank: int) -> str:
        """The phase that the rank recorded last."""
        file = self._phase(rank)
        return file.read_text(encoding="utf-8") if file.exists() else "start"

    def last_sign(self, rank: int) -> float | None:
        """When the rank gave its last sign of life, in seconds since the epoch; None before the first."""
        file = self._sign(rank)
        return file.stat().st_mtime if file.exists() else None

    def is_done(self, rank: int) -> bool:
        """Whether the rank's job returned."""
        return self._done(rank).exists()

    def _phase(self, rank: int) -> Path:
        return self.folder / f"phase-{rank}"

    def _sign(self, rank: int) -> Path:
        return self.folder / f"alive-{rank}"

    def _done(self, rank: int) -> Path:
        return self.folder / f"done-{rank}"
