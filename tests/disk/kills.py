"""SIGKILL at every operation on files, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tests.ranks import forkserver
from tools.chaos.kills import LABELS, Moment, arm


def kills(function: Callable[..., Any], folders: Callable[[int], Path], *args: Any, step: int = 1) -> Iterator[Path]:
    """Run `function(folder, *args)` in fresh folders, killed before its 1st, 2nd, ... operation on files below it.

    Yields each folder as the kill left it, until a run ends by itself; `step` leaves operations out.
    """
    for number in count(1, step):
        folder = folders(number)
        folder.mkdir()
        counts = forkserver().Array("q", len(LABELS))
        process = forkserver().Process(target=_run, args=(Moment("any", number), counts, function, folder, args))
        process.start()
        process.join(timeout=120)
        assert process.exitcode in (0, -signal.SIGKILL), f"before operation {number}: {process.exitcode}"
        if process.exitcode == 0:
            assert number > 3 * step, "hardly any operation was seen"
            return
        yield folder


def _run(moment: Moment, counts: Any, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    os.setsid()  # the kill is of a process group
    arm(folder, moment, counts)
    function(folder, *args)
