"""A ledger of memory: what every phase held at its peak, by what it was, and what it left, so that creep shows.

In: the owners' answer to what they hold. Out: bytes by kind and phase, of this rank. The peak of a phase is measured;
what no owner knows of is the rest. On a CPU rank the device's memory is the process's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


_FORGET_PEAK = "5"  # man 5 proc: reset the peak resident set size to what is resident now


@dataclass(frozen=True)
class Holdings:
    """Bytes that this rank's owners held, at most, since they were asked before."""

    weights: int  # on the device in any case
    visiting_weights: int  # of frozen models that had a turn
    host_weights: int  # of frozen models that live on the host
    gradients: int
    optimizer: int
    caches: int  # keys and values


@dataclass(frozen=True)
class _Entry:
    """What one phase held at its peak."""

    peak: int
    activations: int
    held: Holdings

    @property
    def by_kind(self) -> dict[str, int]:
        held = self.held
        on_device = {
            "weights": held.weights + held.visiting_weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "caches": held.caches,
            "activations": self.activations,
        }
        # On a CPU rank what lies on the host is part of the measured peak.
        beside = 0 if torch.cuda.is_available() else held.host_weights
        other = self.peak - beside - sum(on_device.values())
        return on_device | {"other": other, "host_weights": held.host_weights}


class MemoryLedger:
    """Largest memory use by phase since the last `take`, of this rank."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._sees_peaks = _forget_host_peak()
        self._ask: Callable[[], Holdings] | None = None
        self._left: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._peaks: dict[str, int] = {}
        self._host_peak = 0
        self._at_start = 0

    def watch(self, ask: Callable[[], Holdings]) -> None:
        """From the next phase on, tell kinds apart by what the owners answer."""
        self._ask = ask

    def start(self) -> None:
        """A phase begins: forget the peak so far."""
        if self._ask is not None:
            self._ask()  # from here on owners count anew
        self._host_peak = max(self._host_peak, self._highest())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _forget_host_peak()
        self._at_start = self._in_use()

    def record(self, phase: str) -> None:
        """A phase ended."""
        self._left[phase] = max(self._left.get(phase, 0), self._resident())
        host_peak = self._highest()
        self._host_peak = max(self._host_peak, host_peak)
        peak = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else host_peak
        is_highest = peak >= self._peaks.get(phase, 0)
        if is_highest:
            self._peaks[phase] = peak
        if self._ask is None:
            return
        held = self._ask()
        if is_highest:
            grown = peak - self._at_start - held.caches - held.visiting_weights
            self._entries[phase] = _Entry(peak, max(0, grown), held)

    def take(self) -> dict[str, float]:
        """Bytes by name, and a fresh start.

        Returns:
            `host_bytes/<phase>`: resident at its end; `host_peak_bytes`: most of the process so far;
            `memory/peak_bytes/<phase>`: most on the device (of a CPU rank: of the process) in the phase; and, with
            owners to ask, `memory/<kind>_bytes/<phase>` of weights, gradients, optimizer, caches, activations and
            other, whose sum is that peak, and of host_weights (of a CPU rank part of it). Other is what nobody owns; it
            is negative where an owner's memory was never touched.
        """
        values = {f"host_bytes/{phase}": float(num_bytes) for phase, num_bytes in self._left.items()}
        values |= {f"memory/peak_bytes/{phase}": float(num_bytes) for phase, num_bytes in self._peaks.items()}
        for phase, entry in self._entries.items():
            values |= {f"memory/{kind}_bytes/{phase}": float(size) for kind, size in entry.by_kind.items()}
        self._host_peak = max(self._host_peak, self._highest())
        values["host_peak_bytes"] = float(self._host_peak)
        for kept in (self._left, self._peaks, self._entries):
            kept.clear()
        return values

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _in_use(self) -> int:
        return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else self._resident()

    def _highest(self) -> int:
        """Most the process held since the peak was forgotten; what it holds now where the system cannot tell."""
        if not self._sees_peaks:
            return self._resident()
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return max(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _forget_host_peak() -> bool:
    """Begin a new peak of this process; False where the system cannot."""
    try:
        _CLEAR_REFS.write_text(_FORGET_PEAK)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True
