"""Compares two stored tensors bit by bit without torch: NeMo stores a tied Qwen2's output layer as a copy."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from megatron_rlt.config.folders.tensors import Chunk, ChunkedTensor

_BLOCK_BYTES = 2**20


class FilePart(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__()
        self._file = chunk.file.open("rb")
        self._start, self._size, self._position = chunk.start, chunk.num_bytes, 0

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any buffer
        length = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:length])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def hold_the_same(left: ChunkedTensor, right: ChunkedTensor) -> bool:
    """Whether two tensors are equal bit by bit; parts that are cut differently count as different."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    ours, theirs = ({chunk.offsets: chunk for chunk in one.chunks} for one in (left, right))
    if ours.keys() != theirs.keys() or any(ours[at].shape != theirs[at].shape for at in ours):
        return False
    return all(a == b for at in ours for a, b in zip_longest(_values(ours[at]), _values(theirs[at])))


def _values(chunk: Chunk) -> Iterator[bytes]:
    with zipfile.ZipFile(FilePart(chunk)) as archive:  # as torch.save writes it: one storage
        storage = next(name for name in archive.namelist() if "/data/" in name)
        with archive.open(storage) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
