"""A harmless payload: who runs it makes a folder. Each form in which a file could carry it."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """Unpickling it calls `os.mkdir`."""

    marker: str

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


@dataclass(frozen=True)
class Payload:
    """What makes `marker` if it is run."""

    marker: Path

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(Call(str(self.marker)))

    @property
    def saved_by_torch(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({"x": Call(str(self.marker))}, buffer)
        return buffer.getvalue()

    @property
    def yaml(self) -> str:
        return f"!!python/object/apply:os.mkdir ['{self.marker}']"

    @property
    def python(self) -> str:
        return f"__import__('os').mkdir('{self.marker}')"

    @property
    def template(self) -> str:
        return "{{ cycler.__init__.__globals__.os.mkdir('" + str(self.marker) + "') }}"

    @property
    def has_run(self) -> bool:
        return self.marker.exists()
