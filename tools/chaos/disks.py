"""Small real file systems, where mounting is permitted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096


class MountError(RuntimeError):
    """Mounting is not permitted here."""


def mount(*arguments: str) -> None:
    """Call `mount`. Raises MountError with what it said."""
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if mounted.returncode != 0:
        raise MountError(f"mounting is not permitted here: {mounted.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Take a file system away, also one that is in use."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes on a new folder. Raises MountError."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        unmount(folder)


def resize(disk: Path, num_bytes: int) -> None:
    """Give a tmpfs another size."""
    mount("-o", f"remount,size={num_bytes}", str(disk))


def used_bytes(folder: Path) -> int:
    """Bytes that a tmpfs needs for a folder's files; folders themselves take none."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())
