"""A folder written whole or not at all: beside its place under a hidden name, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlt.disk_faults import free_bytes
from megatron_rlt.folder_lock import locked_beside
from megatron_rlt.whole_files import flush_to_disk, sweep_beside, temporary_beside

_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
)
# Torch's writer loses the number of the error.
_TORCH_FAILURES = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "inline_container")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends.

    Raises:
        ValueError: `target` exists, another start writes it, or the disk refused; nothing is left behind.
    """
    with locked_beside(target):
        sweep_beside(target)
        with _renamed_in_the_end(target) as partial:
            yield partial


@contextmanager
def _renamed_in_the_end(target: Path) -> Iterator[Path]:
    partial = temporary_beside(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*sorted(partial.rglob("*")), partial):
            flush_to_disk(path)
        if target.exists():
            raise ValueError(f"{target}: appeared meanwhile, and nothing is overwritten; remove it and start again")
        partial.rename(target)
        flush_to_disk(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        line = _refusal(error, target)
        if line is None:
            raise
        raise ValueError(line) from error


def _refusal(error: BaseException, target: Path) -> str | None:
    """What a disk refused, in one line; None for every other failure."""
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        reason = str(error.strerror)
    elif isinstance(error, RuntimeError | OSError) and any(phrase in str(error) for phrase in _TORCH_FAILURES):
        reason = "torch could not write to it"
    elif type(error).__name__ == "SafetensorError":
        reason = str(error)
    else:
        return None
    return (
        f"{target}: cannot be written: {reason} ({free_bytes(target):,} bytes are free there); nothing was left behind:"
        " make space, or choose another folder"
    )
