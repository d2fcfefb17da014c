"""Reads tensors from a folder of `.distcp` files, one at a time, whole; the folder is listed by `config.folders`.

Each stored part is what `torch.save` wrote of one tensor; torch's weights-only reader reads it, so nothing is run.
"""

from __future__ import annotations

import pickle
from typing import IO, cast

import torch
from torch import Tensor

from megatron_rlt.config.folders.same_tensor import FilePart
from megatron_rlt.config.folders.tensors import Chunk, ChunkedTensor


def read_tensor(stored: ChunkedTensor, *, layer: int | None = None) -> Tensor:
    """A stored tensor, or one entry of its first dimension (a layer of a stack), on the CPU in its own dtype."""
    shape = stored.shape if layer is None else stored.shape[1:]
    whole = torch.empty(shape, dtype=getattr(torch, stored.dtype))
    for chunk in stored.chunks:
        if layer is None:
            whole[_box(chunk.offsets, chunk.shape)] = _read_chunk(chunk, stored.dtype)
        elif chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.shape[0]:
            values = _read_chunk(chunk, stored.dtype)[layer - chunk.offsets[0]]
            whole[_box(chunk.offsets[1:], chunk.shape[1:])] = values
    return whole


def _box(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def _read_chunk(chunk: Chunk, dtype: str) -> Tensor:
    where = f"{chunk.file} at byte {chunk.start}"
    try:
        with FilePart(chunk) as part:
            values = torch.load(cast("IO[bytes]", part), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{where}: damaged or more than a tensor, nothing was run ({reason}); copy it again"
        ) from error
    if not isinstance(values, Tensor) or str(values.dtype) != f"torch.{dtype}" or values.numel() != _numel(chunk):
        raise ValueError(f"{where}: not the tensor that .metadata describes; copy the checkpoint again")
    return values.reshape(chunk.shape)


def _numel(chunk: Chunk) -> int:
    return int(torch.Size(chunk.shape).numel())
