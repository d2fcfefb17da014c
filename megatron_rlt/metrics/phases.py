"""Times the named phases of a step, and tells whoever listens which phase begins.

In: `with timer.phase("rollout") as phase: ...; phase.tokens = n`. Out: seconds and tokens/s by phase. What a hang is,
and what to do about one, is the listener's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_rlt.metrics.memory import MemoryLedger


@dataclass
class Phase:
    """One phase while it runs; set `tokens` to what it worked on, over all ranks."""

    name: str
    tokens: int = 0


class PhaseTimer:
    """Seconds and tokens by phase since the last `take`. A phase may come several times, but not inside another."""

    def __init__(self, *, heartbeat: Callable[[str], None], memory: MemoryLedger) -> None:
        """
        Args:
            heartbeat: called with a phase's name when it begins.
            memory: gets an entry when a phase ends.
        """
        self._heartbeat = heartbeat
        self._memory = memory
        self._running: str | None = None
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a block. One that raises is not counted."""
        assert self._running is None, f"phase {name} begins inside phase {self._running}"
        self._running = name
        self._heartbeat(name)
        self._memory.start()
        phase = Phase(name)
        started = time.monotonic()
        try:
            yield phase
        finally:
            self._running = None
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started
        self._tokens[name] = self._tokens.get(name, 0) + phase.tokens
        self._memory.record(name)

    def take(self) -> dict[str, float]:
        """By name, and a fresh start: `seconds/<phase>`; `tokens/<phase>` and `tokens_per_second/<phase>` if any."""
        values = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        for name, tokens in self._tokens.items():
            if tokens:
                values[f"tokens/{name}"] = float(tokens)
                values[f"tokens_per_second/{name}"] = tokens / max(self._seconds[name], 1e-9)
        self._seconds.clear()
        self._tokens.clear()
        return values
