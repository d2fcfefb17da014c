"""Writes files whole or not at all: beside their place under another name, then renamed. A link is followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO


def real(path: Path) -> Path:
    """What a path names once all links are followed, whether it exists or not; a link of links to itself stays."""
    return Path(os.path.realpath(path))


def require_writable(key: str, folder: Path) -> None:
    """Make a folder if it is not there, and raise ValueError that names `key` if nothing can be written into it."""
    try:
        real(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"{key}: {folder} cannot be written ({why}); give a folder you may write to") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once the block has ended; an error leaves what was there."""
    path = real(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file's content."""
    with replacing(path) as file:
        file.write(content)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's entries (names, renames)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
