"""A ledger of memory: what each phase left on the host and how high it went on the device, so that creep shows.

On the host the resident set at the end of a phase is what is compared from step to step; its peak is known for the
whole process only.
"""

from __future__ import annotations

import resource
import sys

import psutil
import torch

# getrusage counts kilobytes on Linux and bytes on macOS.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


class MemoryLedger:
    """Largest memory use by phase since the last `take`, of this rank."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._host: dict[str, int] = {}
        self._device: dict[str, int] = {}

    def start(self) -> None:
        """A phase begins: forget the device's peak so far."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def record(self, phase: str) -> None:
        """A phase ended."""
        self._host[phase] = max(self._host.get(phase, 0), int(self._process.memory_info().rss))
        if torch.cuda.is_available():
            self._device[phase] = max(self._device.get(phase, 0), int(torch.cuda.max_memory_allocated()))

    def take(self) -> dict[str, float]:
        """Bytes by name, and a fresh start: `host_bytes/<phase>`, `device_peak_bytes/<phase>`, `host_peak_bytes`."""
        values = {f"host_bytes/{phase}": float(num_bytes) for phase, num_bytes in self._host.items()}
        values |= {f"device_peak_bytes/{phase}": float(num_bytes) for phase, num_bytes in self._device.items()}
        values["host_peak_bytes"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES)
        self._host.clear()
        self._device.clear()
        return values
