"""One start at a time on a folder or a file: a kernel lock, held from the first to the last write.

The kernel frees it when its holder ends, however it ends. A lock file says who holds it; it goes with the lock, and one
that a kill left is no lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rlt.disk_faults import writing
from megatron_rlt.whole_files import make_folder

IN_FOLDER = ".lock"
_PATIENCE_SECONDS = 3.0  # a killed holder's memory is freed first, then its locks
_INTERVAL_SECONDS = 0.1

# What file systems say that cannot lock; some network ones.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL))
_held: set[int] = set()  # descriptors

logger = logging.getLogger(__name__)


class LockedError(ValueError):
    """Another start writes there."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made; an empty one that was made goes again. LockedError as `locked_beside`.

    A file system without locks is warned of, and nothing is held.
    """
    was_there = folder.is_dir()
    try:
        with _locked(folder / IN_FOLDER, folder):
            yield
    finally:
        if not was_there:
            with suppress(OSError):  # it holds something now
                folder.rmdir()


@contextmanager
def locked_beside(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that will be renamed into its place, by a hidden file beside it.

    Raises LockedError, with host and process id of the holder, if another start holds it.
    """
    with _locked(path.with_name(f".{path.name[:40]}{IN_FOLDER}"), path):
        yield


@contextmanager
def _locked(file: Path, what: Path) -> Iterator[None]:
    descriptor = _acquire(file, what)
    try:
        yield
    finally:
        if descriptor is not None:
            # While it is held: whoever opened the file before tries again with the next file, see `_is_file_of`.
            with suppress(OSError):
                file.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(file: Path, what: Path) -> int | None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        make_folder(file.parent)
        try:
            with writing(file):
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the last holder removed the folder, which was empty
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                logger.warning(
                    "%s: this file system has no locks (%s): see to it yourself that no second start writes there",
                    what, error.strerror,
                )  # fmt: skip
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                raise LockedError(
                    f"{what} is being written by another start ({_shown(holder)}): wait for its end, or end it"
                ) from error
            time.sleep(_INTERVAL_SECONDS)
            continue
        if _is_file_of(descriptor, file):
            _write_holder(descriptor, file)
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)


def _is_file_of(descriptor: int, file: Path) -> bool:
    """Whether the locked file still has its name: its last holder may have removed it meanwhile."""
    try:
        named = file.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (named.st_ino, named.st_dev) == (held.st_ino, held.st_dev)


def _write_holder(descriptor: int, file: Path) -> None:
    with writing(file):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, pid {os.getpid()}".encode(), 0)


def _shown(holder: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in holder[:200]) or "holder unknown"


def _forget() -> None:
    """A forked child, such as a reader of data, must not keep its parent's lock alive."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
