"""Times the named phases of a step, and tells whoever listens which phase begins.

In: `with timer.phase("rollout") as phase: ...; phase.count(tokens, model_flops)`. Out: seconds, tokens and model FLOP
by phase, and their rates. What a hang is, and what to do about one, is the listener's; what a model call costs, that of
`models/flops.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_rlt.metrics.memory import MemoryLedger


@dataclass
class Phase:
    """One phase while it runs, with what it worked on over all ranks."""

    name: str
    tokens: int = 0
    model_flops: float = 0.0

    def count(self, tokens: int, model_flops: float) -> None:
        """Add what one call of a model worked on, over all ranks."""
        self.tokens += tokens
        self.model_flops += model_flops


class PhaseTimer:
    """Seconds and work by phase since the last `take`. A phase may come several times, but not inside another."""

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
        self._model_flops: dict[str, float] = {}

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
        self._model_flops[name] = self._model_flops.get(name, 0.0) + phase.model_flops
        self._memory.record(name)

    def take(self) -> dict[str, float]:
        """By name, and a fresh start: `seconds/<phase>`; `tokens/<phase>` and `model_flops/<phase>` if any."""
        values = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        values |= {f"tokens/{name}": float(tokens) for name, tokens in self._tokens.items() if tokens}
        values |= {f"model_flops/{name}": flops for name, flops in self._model_flops.items() if flops}
        for kept in (self._seconds, self._tokens, self._model_flops):
            kept.clear()
        return values


def rates(values: Mapping[str, float], *, num_devices: int, peak_flops_per_second: float | None) -> dict[str, float]:
    """What follows from the values of `PhaseTimer.take`, once they are those of the slowest rank.

    Args:
        num_devices: ranks that shared the work.
        peak_flops_per_second: of one device; None where it is not known.

    Returns:
        `tokens_per_second/<phase>` and `model_flops_per_second/<phase>` of all devices together, and
        `peak_share/<phase>` if the peak is known.
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


# A device's peak rate of matrix products, which shares are quoted against.
# Dense bfloat16 without sparsity, from NVIDIA's data sheets of the A100 (2021), H100 and H200 (both 2023). Others are
# stated in the configuration: a wrong peak is worse than none.
_PEAK_FLOPS_PER_SECOND = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops_per_second(configured: float | None, device_name: str | None) -> float | None:
    """Of one device; None where nobody knows it.

    Args:
        configured: what the user states; it goes first.
        device_name: as CUDA calls it; None on a CPU.
    """
    if configured is not None or device_name is None:
        return configured
    return _PEAK_FLOPS_PER_SECOND.get(device_name)
