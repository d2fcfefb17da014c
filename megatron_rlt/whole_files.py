"""Writes files and folders whole or not at all: beside their place under a name of their own, then renamed.

A link is followed.

Whatever the disk refuses is a DiskError of one line, and what was written so far goes. Leftovers of a kill have a
name by which the next start finds them: see `sweep`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from megatron_rlt.disk_faults import writing

_TEMPORARY = re.compile(r"\..*\.rlt-[0-9a-f]{8}\.tmp", re.DOTALL)
_KEPT_CHARACTERS = 40  # of the final name: 4 bytes each at most, within the 255 of a name
_SWEPT_LEVELS = 3  # of a run folder, such as `scored/parts/.part-000001.parquet.rlt-....tmp`

# What file systems say that cannot flush a folder: some network and FUSE ones.
_NO_FOLDER_FLUSH = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EISDIR, errno.ENOTTY))
_unflushed: set[int] = set()  # devices that were warned of

logger = logging.getLogger(__name__)


def temporary_beside(path: Path) -> Path:
    """A hidden name beside a path that nobody else uses, and by which `sweep` knows it."""
    return path.with_name(f".{path.name[:_KEPT_CHARACTERS]}.rlt-{secrets.token_hex(4)}.tmp")


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
    given, path = path, real(path)
    temporary = temporary_beside(path)
    with writing(given):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file's content."""
    with replacing(path) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there."""
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a file, or a link that leads nowhere
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def discard(path: Path) -> None:
    """Remove a folder so that a kill leaves no part of it under its name."""
    doomed = temporary_beside(path)
    with writing(path):
        path.rename(doomed)
        flush_to_disk(path.parent)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed starts left below a folder. Only for the holder of its lock."""
    for place, names, files in os.walk(folder):
        for name in [name for name in names if _TEMPORARY.fullmatch(name)]:
            shutil.rmtree(Path(place) / name)
            names.remove(name)
        for name in files:
            if _TEMPORARY.fullmatch(name):
                (Path(place) / name).unlink()
        if len(Path(place).relative_to(folder).parts) + 1 >= _SWEPT_LEVELS:
            names.clear()


def sweep_beside(path: Path) -> None:
    """Remove what killed starts left of one file or folder beside its place."""
    beginning = f".{path.name[:_KEPT_CHARACTERS]}.rlt-"
    if not path.parent.is_dir():
        return
    for place in path.parent.iterdir():
        if place.name.startswith(beginning) and _TEMPORARY.fullmatch(place.name):
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder's entries (names, renames); a file system that cannot flush folders is named once."""
    is_folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_FLUSH:
            raise
        _warn_once(path, error)
    finally:
        os.close(descriptor)


def _warn_once(folder: Path, error: OSError) -> None:
    device = folder.stat().st_dev
    if device not in _unflushed:
        _unflushed.add(device)
        logger.warning(
            "%s: this file system cannot flush folders (%s): a power failure may lose the newest files, a kill cannot",
            folder, error.strerror,
        )  # fmt: skip
