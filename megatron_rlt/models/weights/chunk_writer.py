"""Writes a folder of `.distcp` files in Megatron's `torch_dist` format, one tensor at a time, from one process.

The files are what torch's own FileSystemWriter writes, without process group and without holding more than one tensor.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rlt.config.folders.tensors import METADATA_FILE

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1} | {
    "common_backend": "torch",
    "common_backend_version": 1,
}


class ChunkWriter:
    """One folder being written; a context manager. `finish` writes what makes the folder readable."""

    def __init__(self, folder: Path, *, max_file_bytes: int) -> None:
        self._folder, self._max_file_bytes = folder, max_file_bytes
        self._file: IO[bytes] | None = None
        self._num_files = 0
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: Tensor, *, layer: int | None = None, num_layers: int = 0) -> None:
        """Write a tensor, or one layer of a stack of `num_layers` tensors of one name."""
        part = tensor.detach().contiguous()
        part = part.clone() if part.untyped_storage().nbytes() != part.nbytes else part
        offsets = torch.Size([0] * part.dim())
        shape = part.shape
        if layer is not None:
            part, offsets, shape = part[None], torch.Size([layer, *offsets]), torch.Size([num_layers, *shape])
        entry = self._entries.get(name)
        if entry is None:
            properties = TensorProperties(dtype=part.dtype, layout=torch.strided)
            entry = self._entries[name] = TensorStorageMetadata(properties=properties, size=shape, chunks=[])
        assert isinstance(entry, TensorStorageMetadata), f"{name} is an object"
        assert entry.size == shape, f"{name} was {entry.size}, not {shape}"
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=part.shape))
        self._write(MetadataIndex(name, offsets), part)

    def add_empty_state(self, name: str, *, layer: int, num_layers: int) -> None:
        """Write the empty `_extra_state` that Megatron asks for, of one layer's module."""
        key = f"{name}/shard_{layer}_{num_layers}"
        self._entries[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), [None])

    def finish(self, common: dict[str, Any]) -> None:
        """Write the state without tensors, the format, and last `.metadata`."""
        torch.save(common, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
        content = io.BytesIO()
        pickle.dump(Metadata(state_dict_metadata=self._entries, storage_data=self._places), content)
        (self._folder / METADATA_FILE).write_bytes(content.getvalue())

    def _write(self, index: MetadataIndex, value: object) -> None:
        if self._file is None or self._file.tell() >= self._max_file_bytes:
            if self._file is not None:
                self._file.close()
            self._file = (self._folder / f"__0_{self._num_files}.distcp").open("wb")
            self._num_files += 1
        start = self._file.tell()
        torch.save(value, self._file)
        name = Path(self._file.name).name
        self._places[index] = _StorageInfo(name, start, self._file.tell() - start)
