"""How long each rank has given no sign of life, in the launcher's own time.

A rank's watchdog gives a sign about once a second, also while its main thread works or waits. A rank that is stopped,
or whose watchdog waits for a file system that hangs, gives none and cannot report itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from megatron_rlt.launch.records import Records

# A watchdog ends its process at the latest 1.25 timeouts and five seconds after its last sign. One that is silent for
# longer cannot.
_MAX_TIMEOUTS, _MAX_MARGIN_SECONDS = 1.25, 10.0
# Signs come every second at the latest. A rank that was quiet for so long when another's watchdog fired is the cause.
_QUIET_SHARE, _MIN_QUIET_SECONDS = 0.5, 5.0
# The whole machine may be suspended: no single look counts for more.
_MAX_LOOK_SECONDS = 1.0


class Silence:
    """Silence of all ranks; each counts from its first sign on."""

    def __init__(self, records: Records, world_size: int, timeout_seconds: float) -> None:
        """`timeout_seconds`: of the ranks' watchdogs."""
        self._records, self._timeout_seconds = records, timeout_seconds
        self._last_signs: list[float | None] = [None] * world_size
        self._seconds = [0.0] * world_size
        self._looked_at = time.monotonic()

    def listen(self, ranks: Iterable[int]) -> None:
        """Look for new signs of the ranks that run; the silence of others stays as it was."""
        now = time.monotonic()
        elapsed, self._looked_at = min(now - self._looked_at, _MAX_LOOK_SECONDS), now
        for rank in ranks:
            sign = self._records.last_sign(rank)
            is_new = sign != self._last_signs[rank]
            self._last_signs[rank] = sign
            if sign is not None:
                self._seconds[rank] = 0.0 if is_new else self._seconds[rank] + elapsed

    def seconds(self, rank: int) -> float:
        """Seconds since the rank's last sign of life."""
        return self._seconds[rank]

    def is_too_long(self, ranks: Iterable[int]) -> bool:
        """Whether one of the ranks was silent for longer than its watchdog allows, and its job has not returned."""
        limit = _MAX_TIMEOUTS * self._timeout_seconds + _MAX_MARGIN_SECONDS
        return any(self._seconds[rank] > limit and not self._records.is_done(rank) for rank in ranks)

    def quiet_ranks(self) -> list[int]:
        """Ranks that gave no sign of life when they were last looked at."""
        limit = max(_QUIET_SHARE * self._timeout_seconds, _MIN_QUIET_SECONDS)
        return [rank for rank, seconds in enumerate(self._seconds) if seconds > limit]
