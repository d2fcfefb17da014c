"""Says from time to time how far a conversion is: tensors, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts the tensors of one conversion, over all its parts."""

    def __init__(self, num_tensors: int) -> None:
        self._total, self._done, self._num_bytes = num_tensors, 0, 0
        self._begun = self._last = time.monotonic()

    def shown(self, tensors: Iterable[tuple[str, Tensor]], dtype: str | None) -> Iterator[tuple[str, Tensor]]:
        """Hand tensors on in the wanted dtype; None: their own."""
        for name, tensor in tensors:
            wanted = tensor if dtype is None else tensor.to(getattr(torch, dtype))
            yield name, wanted
            self._done, self._num_bytes = self._done + 1, self._num_bytes + wanted.nbytes
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last, seconds = now, now - self._begun
        left = seconds * (self._total - self._done) / self._done
        rate = self._num_bytes / seconds / 1e6
        print(f"{self._done} of {self._total} tensors, {rate:,.0f} MB/s, about {left:.0f} s left", flush=True)
