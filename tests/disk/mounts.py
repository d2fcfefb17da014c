"""Small real file systems for tests, where mounting is permitted; and processes without the rights of root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import forkserver
from tools.chaos import disks

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes on a new folder; skips the test where mounting is not permitted."""
    with skipped_without_mounts(), disks.small_disk(folder, num_bytes) as disk:
        yield disk


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder, mounted read-only on itself."""
    with skipped_without_mounts():
        disks.mount("--bind", str(folder), str(folder))
    try:
        disks.mount("-o", "remount,ro,bind", str(folder))
        yield folder
    finally:
        disks.unmount(folder)


@contextmanager
def skipped_without_mounts() -> Iterator[None]:
    """Skip the test where mounting is not permitted."""
    try:
        yield
    except disks.MountError as error:
        pytest.skip(str(error))


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
