"""Small real file systems for tests, where mounting is permitted; and processes without the rights of root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import forkserver

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes on a new folder; skips the test where mounting is not permitted."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder, mounted read-only on itself."""
    _mount("--bind", str(folder), str(folder))
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def in_process(function: Callable[..., Any], *args: Any) -> str:
    """What a function of another process raised, as `Class: message`, or what it returned."""
    queue = forkserver().Queue()
    process = forkserver().Process(target=_answer, args=(queue, function, args))
    process.start()
    answer: str = queue.get(timeout=120)
    process.join(timeout=30)
    return answer


def as_nobody() -> None:
    """Give up root's rights, which no permission stops."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _answer(queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        queue.put(str(function(*args)))
    except BaseException as error:
        queue.put(f"{type(error).__name__}: {error}")


def _mount(*arguments: str) -> None:
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
