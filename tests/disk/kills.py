"""SIGKILL at every operation on files, one after the other: what a power failure does between two of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tests.ranks import forkserver

_OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "open"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kills(function: Callable[..., Any], folders: Callable[[int], Path], *args: Any, step: int = 1) -> Iterator[Path]:
    """Run `function(folder, *args)` in fresh folders, killed before its 1st, 2nd, ... operation on files below it.

    Yields each folder as the kill left it, until a run ends by itself; `step` leaves operations out.
    """
    for number in count(1, step):
        folder = folders(number)
        folder.mkdir()
        process = forkserver().Process(target=_run, args=(number, function, folder, args))
        process.start()
        process.join(timeout=120)
        assert process.exitcode in (0, -signal.SIGKILL), f"before operation {number}: {process.exitcode}"
        if process.exitcode == 0:
            assert number > 3 * step, "hardly any operation was seen"
            return
        yield folder


def _run(number: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    seen = [0]

    def on_event(event: str, details: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not _place(event, details).startswith(str(folder)):
            return
        if event == "open" and not details[2] & _WRITES:
            return
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    function(folder, *args)


def _place(event: str, details: tuple[Any, ...]) -> str:
    """A path; `shutil.rmtree` removes by names in a folder that it has opened."""
    if event in ("os.remove", "os.rmdir") and details[1] >= 0:
        return str(Path(f"/proc/self/fd/{details[1]}").readlink())
    return str(details[0])
