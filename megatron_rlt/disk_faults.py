"""Says in one line why a file could not be written or read: path, reason, and what is free there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a disk, its mount or its owner can refuse. ENOENT is not among them: a missing file is mostly a fault of this
# program, which needs its traceback, except behind a link that leads nowhere.
_OF_THE_DISK = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG"),
        *("ELOOP", "ENOTDIR", "EISDIR", "EIO", "ESTALE", "EMFILE", "ENFILE", "ETXTBSY", "ENODEV", "ENXIO"),
    )
)
_OF_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_REMEDIES = {
    errno.ENOSPC: "make space or choose another folder",
    errno.EDQUOT: "your quota is used up: make space or choose another folder",
    errno.EFBIG: "a limit on the size of files is reached: raise it (ulimit -f) or choose another folder",
    errno.EROFS: "choose a folder that is not mounted read-only",
    errno.EACCES: "give yourself the right to it or choose another folder",
    errno.EPERM: "give yourself the right to it or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class DiskError(RuntimeError):
    """The disk refused: the one line says all, and a traceback would not help."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses in this block into a DiskError of one line; `path`: what is being written."""
    try:
        yield
    except OSError as error:
        if (line := refusal(error, path)) is None:
            raise
        raise DiskError(line) from error


@contextmanager
def disk_refusals() -> Iterator[None]:
    """Turn what the disk refuses in this block, wherever an error names a file, into a DiskError of one line."""
    try:
        yield
    except OSError as error:
        if (line := refusal(error, None)) is None:
            raise
        raise DiskError(line) from error


def refusal(error: OSError, path: Path | None) -> str | None:
    """Path, reason, free bytes and remedy in one line; None where it is no refusal of the disk.

    `path`: what is named where the error names no file: an error while writing to an open file has no name.
    """
    named = error.filename2 or error.filename  # of two, the second is the one that is written
    named = named if isinstance(named, str | bytes | os.PathLike) else None
    place = Path(os.fsdecode(named)) if named else path
    if place is None:
        return None
    if path is not None and place.parent == path.parent:
        place = path  # not the temporary name beside it
    if link := _dangling(place) or (None if path is None else _dangling(path)):
        return f"{link} is a link to {os.readlink(link)}, which does not exist: make that folder or remove the link"  # noqa: PTH115
    if error.errno is None or error.errno not in _OF_THE_DISK:
        return None
    verb = "written" if path is not None or error.errno in _OF_SPACE else "used"
    remedy = _REMEDIES.get(error.errno, "look at the disk or choose another folder")
    return f"{place} cannot be {verb}: {error.strerror} ({free_bytes(place):,} bytes are free there); {remedy}"


def free_bytes(path: Path) -> int:
    """What an unprivileged user may still write at a path, which need not exist; 0 where nothing can be found out."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0


def _dangling(path: Path) -> Path | None:
    """The first link on the way to a path that leads nowhere."""
    for place in reversed((path, *path.absolute().parents)):
        try:
            if place.is_symlink() and not place.exists():
                return place
        except OSError:
            return None
    return None
