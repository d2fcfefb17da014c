"""State of one rank that its layout does not determine: random-number states, and the caller's own bytes."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rlt.checkpoint.torch_format import load_plain, loading


@dataclass(frozen=True)
class RankState:
    """Random-number states of one rank, and the caller's own bytes."""

    rng: bytes
    extra: bytes

    @classmethod
    def capture(cls, *, extra: bytes) -> RankState:
        """The current states of Python's, numpy's, torch's and Megatron's generators."""
        name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
        states = {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached_gaussian),
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "megatron": get_cuda_rng_tracker().get_states(),
        }
        return cls(_to_bytes(states), extra)

    def restore_rng(self) -> None:
        """Restore every generator. Call it last: building models and loaders may draw random numbers.

        Raises ValueError for states that this program did not capture.
        """
        what = Path("the random-number states of a checkpoint")
        states = load_plain(self.rng, what)
        with loading(what):
            self._restore(states)

    def _restore(self, states: Any) -> None:  # noqa: ANN401 - plain values
        name, keys, position, has_gauss, cached_gaussian = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
        torch.set_rng_state(states["torch"])
        if states["device"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["device"])
        get_cuda_rng_tracker().set_states(states["megatron"])

    def to_bytes(self) -> bytes:
        # As bytearrays: torch's weights-only reader refuses an empty `bytes`.
        return _to_bytes({"rng": bytearray(self.rng), "extra": bytearray(self.extra)})

    @classmethod
    def from_bytes(cls, content: bytes, source: Path) -> RankState:
        """The inverse of `to_bytes`. Raises ValueError, naming `source`, for anything else."""
        parts = load_plain(content, source)
        if not isinstance(parts, dict) or not all(isinstance(parts.get(name), bytearray) for name in ("rng", "extra")):
            raise ValueError(f"{source} holds no state of a rank")
        return cls(bytes(parts["rng"]), bytes(parts["extra"]))


def _to_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
