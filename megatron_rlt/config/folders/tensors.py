"""Lists the tensors of a folder of `.distcp` files (Megatron's `torch_dist`, torch's DCP) from its `.metadata`.

Nothing in the folder is run and no torch is needed: see `pickles`. Values are read by `models.weights`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.config.folders.pickles import Record, read_pickle

METADATA_FILE = ".metadata"
_TENSOR_FILE = re.compile(r"__\d+_\d+\.distcp")
_DCP = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A stored tensor; its chunks cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str  # torch's name: float32, bfloat16, ...
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class TensorFolder:
    """Tensors by stored name, and names of stored objects, such as `_extra_state`."""

    folder: Path
    tensors: Mapping[str, ChunkedTensor]
    objects: tuple[str, ...]


def read_tensor_folder(folder: Path) -> TensorFolder:
    """List a folder's tensors.

    Raises:
        ValueError: `.metadata` is missing, damaged or holds more than data; a file is missing or cut short; or a
            tensor's parts do not cover it.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder}: holds no {METADATA_FILE}, which is written last: the save did not end; take another checkpoint"
        )
    found = read_pickle(file)
    try:
        if not isinstance(found, Record) or found.type_name != f"{_DCP}Metadata":
            raise ValueError(f"it holds {type(found).__name__}")
        places = {_place_key(key): place for key, place in (found.fields["storage_data"] or {}).items()}
        entries = {str(name): entry for name, entry in found.fields["state_dict_metadata"].items()}
        tensors = {
            name: _tensor(folder, name, entry, places)
            for name, entry in entries.items()
            if entry.type_name == f"{_DCP}TensorStorageMetadata"
        }
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{file}: not the metadata of torch's distributed checkpoints ({type(error).__name__}: {error}); copy the"
            " checkpoint again"
        ) from error
    _check_files(tensors)
    return TensorFolder(folder, tensors, tuple(sorted(entries.keys() - tensors.keys())))


def _place_key(key: Record) -> tuple[str, tuple[int, ...] | None]:
    offset = key.fields.get("offset")
    return key.fields["fqn"], None if offset is None else _size(offset)


def _tensor(folder: Path, name: str, entry: Record, places: Mapping[Any, Record]) -> ChunkedTensor:
    shape = _size(entry.fields["size"])
    chunks = []
    for box in entry.fields["chunks"]:
        offsets, sizes = _size(box.fields["offsets"]), _size(box.fields["sizes"])
        place = places.get((name, offsets))
        if place is None:
            raise ValueError(f"{folder}: {METADATA_FILE} says nowhere where {name} {list(offsets)} lies; copy it again")
        fields = place.fields
        if not _TENSOR_FILE.fullmatch(fields["relative_path"]):
            raise ValueError(f"{folder}: {name} lies outside its folder, in {fields['relative_path']!r}; do not use it")
        if fields.get("transform_descriptors"):
            raise ValueError(f"{folder}: {name} is stored compressed; save the checkpoint without extensions")
        chunks.append(Chunk(offsets, sizes, folder / fields["relative_path"], fields["offset"], fields["length"]))
    _check_cover(folder, name, shape, chunks)
    return ChunkedTensor(shape, _dtype(entry.fields["properties"]), tuple(chunks))


def _size(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - a record of torch.Size, or a tuple of one
    numbers = value.arguments[0] if isinstance(value, Record) else value
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TypeError(f"{numbers!r} is no shape")
    return tuple(numbers)


def _dtype(properties: Record) -> str:
    dtype = properties.fields["dtype"] if "dtype" in properties.fields else properties.arguments[0]
    name: str = dtype.type_name
    return name.removeprefix("torch.")


def _check_cover(folder: Path, name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Refuse parts that leave a gap, lie outside, or lie over each other."""
    inside = all(
        len(chunk.offsets) == len(chunk.shape) == len(shape)
        and all(start + size <= whole for start, size, whole in zip(chunk.offsets, chunk.shape, shape, strict=True))
        for chunk in chunks
    )
    covered = sum(math.prod(chunk.shape) for chunk in chunks)
    if not inside or covered != math.prod(shape) or _overlap(chunks):
        raise ValueError(
            f"{folder}: the parts of {name} cover {covered:,} of its {math.prod(shape):,} values; the save did not end,"
            " or its metadata is damaged: take another checkpoint"
        )


def _overlap(chunks: list[Chunk]) -> bool:
    """Boxes of a regular grid, as all writers make, overlap only where two begin at the same place."""
    return len({chunk.offsets for chunk in chunks}) != len(chunks)


def _check_files(tensors: Mapping[str, ChunkedTensor]) -> None:
    ends: dict[Path, int] = {}
    for chunk in _chunks(tensors):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.num_bytes)
    for file, end in sorted(ends.items()):
        if not file.is_file():
            raise ValueError(f"{file}: missing, but its tensors stand in {METADATA_FILE}; copy the checkpoint again")
        size = file.stat().st_size
        if size < end:
            raise ValueError(f"{file}: cut short: {size:,} bytes instead of {end:,}; copy the checkpoint again")


def _chunks(tensors: Mapping[str, ChunkedTensor]) -> Iterator[Chunk]:
    for tensor in tensors.values():
        yield from tensor.chunks
