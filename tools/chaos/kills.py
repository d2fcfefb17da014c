"""SIGKILL before an operation on files, chosen by its number: what a power failure does between two of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "open"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

LABELS = ("any", "save", "export", "removal")
"""What an operation is part of; each is also `any`."""


@dataclass(frozen=True)
class Moment:
    """Before the operation of this number, from 1, among those of one label; 0: never."""

    label: str
    number: int


def arm(root: Path, moment: Moment, counts: Any) -> None:  # noqa: ANN401 - a shared array, whose class has no name
    """From now on this process and those forked from it count their operations on files below `root`.

    All of the process group is killed at the moment. `counts`: a shared array of one number per label.
    """

    def on_event(event: str, details: tuple[Any, ...]) -> None:
        if (labels := labels_of(root, event, details)) is None:
            return
        with counts.get_lock():
            for label in labels:
                counts[LABELS.index(label)] += 1
            reached = moment.label in labels and counts[LABELS.index(moment.label)] == moment.number
        if reached:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(on_event)


def labels_of(root: Path, event: str, details: tuple[Any, ...]) -> set[str] | None:
    """What an audit event is part of; None where it changes nothing below `root`."""
    if event not in _OPERATIONS or not (place := place_of(event, details)).startswith(f"{root}/"):
        return None
    if event == "open" and not details[2] & _WRITES:
        return None
    names = place[len(str(root)) + 1 :].split("/")
    return {"any", *_further_labels(event, names)}


def place_of(event: str, details: tuple[Any, ...]) -> str:
    """A path; `shutil.rmtree` removes by names in a folder that it has opened."""
    if event in ("os.remove", "os.rmdir") and details[1] >= 0:
        return str(Path(f"/proc/self/fd/{details[1]}").readlink())
    return str(details[0])


def _further_labels(event: str, names: Iterable[str]) -> set[str]:
    names = list(names)
    if event in ("os.remove", "os.rmdir"):
        return {"removal"}
    if event == "os.rename" and any(name.startswith("step-") for name in names):
        return {"removal"}  # a folder gets a hidden name before it is removed
    if any(name == "hf" or name.startswith(".hf.rlt-") for name in names):
        return {"export"}
    return {"save"} if "checkpoints" in names else set()
