"""Tracks peak memory per phase by category on this rank, and the memory still resident afterwards, to expose leaks.

On a CPU rank, device memory means the memory of the process.
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
class MemoryUsage:
    """Peak bytes on this rank by category since the previous query."""

    weights: int  # always on the device
    onloaded_weights: int  # offloaded models while they were on the device
    host_weights: int  # offloaded models in host memory
    gradients: int
    optimizer: int
    caches: int  # KV cache


@dataclass(frozen=True)
class _Entry:
    """Memory of one phase at its peak, in bytes."""

    peak: int
    activations: int
    held: MemoryUsage

    @property
    def by_kind(self) -> dict[str, int]:
        held = self.held
        on_device = {
            "weights": held.weights + held.onloaded_weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "caches": held.caches,
            "activations": self.activations,
        }
        # On a CPU rank, host weights are part of the measured peak.
        beside = 0 if torch.cuda.is_available() else held.host_weights
        other = self.peak - beside - sum(on_device.values())
        return on_device | {"other": other, "host_weights": held.host_weights}


class MemoryLedger:
    """Peak memory per phase on this rank since the last `take`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._sees_peaks = _forget_host_peak()
        self._query: Callable[[], MemoryUsage] | None = None
        self._left: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._peaks: dict[str, int] = {}
        self._host_peak = self._at_start = 0

    def watch(self, query: Callable[[], MemoryUsage]) -> None:
        """Split memory by category from the next phase on, with `query` for the usage by weights, KV cache etc."""
        self._query = query

    def start(self) -> None:
        """Begin a phase: reset the peak."""
        if self._query is not None:
            self._query()  # resets the peaks of all categories
        self._host_peak = max(self._host_peak, self._highest())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        _forget_host_peak()
        self._at_start = self._in_use()

    def record(self, phase: str) -> None:
        """Record the phase that ended."""
        self._left[phase] = max(self._left.get(phase, 0), self._resident())
        host_peak = self._highest()
        self._host_peak = max(self._host_peak, host_peak)
        peak = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else host_peak
        is_highest = peak >= self._peaks.get(phase, 0)
        if is_highest:
            self._peaks[phase] = peak
        held = None if self._query is None else self._query()
        if held is not None and is_highest:
            grown = peak - self._at_start - held.caches - held.onloaded_weights
            self._entries[phase] = _Entry(peak, max(0, grown), held)

    def take(self) -> dict[str, float]:
        """Return bytes by name and reset.

        `host_bytes/<phase>`: resident at its end; `host_peak_bytes`: process peak so far; `memory/peak_bytes/<phase>`:
        device peak in the phase. After `watch` also `memory/<kind>_bytes/<phase>` of weights, gradients, optimizer,
        caches, activations and other, which sum to that peak, and of host_weights (on a CPU rank part of it). "Other"
        is the unattributed rest; it is negative if attributed memory was never touched.
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
        """Peak resident bytes of the process since the last reset; current ones if the system records no peak."""
        if not self._sees_peaks:
            return self._resident()
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return max(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _forget_host_peak() -> bool:
    """Reset the peak resident size of this process; returns False if the system cannot."""
    try:
        _CLEAR_REFS.write_text(_FORGET_PEAK)
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True
