"""A census of a model's tensors under Hugging Face names: shape, dtype and hash, the same for every kind of folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """One tensor."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str  # of its bytes, row by row

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, hashlib.sha256(values.data).hexdigest())


Census = dict[str, TensorRecord]


def counted(tensors: Iterable[tuple[str, Tensor]], census: Census) -> Iterator[tuple[str, Tensor]]:
    """Hand tensors on, and enter each in the census."""
    for name, tensor in tensors:
        census[name] = TensorRecord.of(tensor)
        yield name, tensor


def census_faults(before: Census, after: Census) -> list[str]:
    """How a target's tensors differ from its source's: missing, surplus, changed."""
    faults = [f"{name} is missing" for name in before if name not in after]
    faults += [f"{name} is surplus" for name in after if name not in before]
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            faults.append(f"{name} was {_shown(before[name])}, is {_shown(after[name])}")
    return sorted(faults)


def _shown(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.shape)} {record.sha256[:12]}"


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file directly in a folder, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
