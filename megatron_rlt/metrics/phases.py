"""Measures seconds, tokens, model FLOPs and memory of the named phases of a step, and computes rates.

Usage: `with timer.phase("rollout") as phase: ...; phase.count(tokens, model_flops)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_rlt.config.devices import known_peak
from megatron_rlt.metrics.memory import MemoryLedger


@dataclass
class Phase:
    """A running phase, with its work summed over all ranks."""

    name: str
    tokens: int = 0
    model_flops: float = 0.0

    def count(self, tokens: int, model_flops: float) -> None:
        """Add the work of one model call, summed over all ranks."""
        self.tokens += tokens
        self.model_flops += model_flops


class PhaseTimer:
    """Seconds and work per phase since the last `take`. A phase may repeat, but phases do not nest."""

    def __init__(self, *, heartbeat: Callable[[str], None], memory: MemoryLedger) -> None:
        """`heartbeat` is called with the name of each phase when it begins."""
        self._heartbeat, self._memory = heartbeat, memory
        self._running: str | None = None
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._model_flops: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a block; a block that raises is not counted."""
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
        self._model_flops[name] = self._model_flops.get(name, 0.0) + phase.model_flops
        self._memory.record(name)

    def take(self) -> dict[str, float]:
        """Return `seconds/<phase>`, and `tokens/<phase>` and `model_flops/<phase>` if not 0; then reset."""
        values = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        values |= {f"tokens/{name}": float(tokens) for name, tokens in self._tokens.items() if tokens}
        values |= {f"model_flops/{name}": flops for name, flops in self._model_flops.items() if flops}
        for kept in (self._seconds, self._tokens, self._model_flops):
            kept.clear()
        return values


def rates(values: Mapping[str, float], *, num_devices: int, peak_flops_per_second: float | None) -> dict[str, float]:
    """Compute rates from the values of `PhaseTimer.take`, maximized over ranks.

    Args:
        peak_flops_per_second: of one device; None if unknown.

    Returns:
        `tokens_per_second/<phase>` and `model_flops_per_second/<phase>` of all devices together; if the peak is known,
        also `peak_share/<phase>` (model FLOPs utilization).
    """
    found = {}
    for name, work in values.items():
        kind, _, phase = name.partition("/")
        if kind not in ("tokens", "model_flops"):
            continue
        rate = work / max(values[f"seconds/{phase}"], 1e-9)
        found[f"{kind}_per_second/{phase}"] = rate
        if kind == "model_flops" and peak_flops_per_second is not None:
            found[f"peak_share/{phase}"] = rate / (num_devices * peak_flops_per_second)
    return found


def peak_flops_per_second(configured: float | None, device_name: str | None) -> float | None:
    """Peak of one device: the configured value, else by CUDA's device name (None on a CPU); None if unknown."""
    return known_peak(device_name) if configured is None else configured
