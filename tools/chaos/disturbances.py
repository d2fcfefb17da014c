"""Full disks, second starts, and what listens: one try of each with a case's command."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

from tools.chaos.cases import Case
from tools.chaos.disks import PAGE, resize, small_disk
from tools.chaos.lives import Reference, differences, said
from tools.chaos.starts import Start

_ROOMY = 512 * 2**20
_FREE = "bytes are free there"


def full_disk(case: Case, reference: Reference, root: Path, rng: random.Random) -> tuple[bool, list[str]]:
    """A disk that is too small by a random share; then it grows. Whether it was full, and faults. Raises MountError."""
    size = max(PAGE, int(reference.num_bytes * rng.random()) // PAGE * PAGE)
    faults = []
    with small_disk(root, size):
        first = Start(case, root, "forked").finish()
        if first.status != 0:
            if first.status not in (1, 2) or len(first.error_lines) != 1 or first.has_traceback:
                faults.append(f"{size} bytes: not one line: {said(first)}")
            elif str(root) not in first.error_lines[0] or _FREE not in first.error_lines[0]:
                faults.append(f"{size} bytes: no path or free bytes: {first.error_lines[0]}")
            faults += [f"{size} bytes: left behind: {path}" for path in root.rglob(".*.tmp")]
            resize(root, _ROOMY)
            again = Start(case, root, "forked").finish()
            faults += [f"{size} bytes, then space: {said(again)}"] if again.status != 0 else []
        if not faults:
            faults += differences(case, reference, root)
    root.rmdir()
    return first.status != 0, faults


def second_start(case: Case, reference: Reference, root: Path, rng: random.Random) -> tuple[bool, list[str]]:
    """Start it twice: the first stands still somewhere while the second is refused. Whether they met, and faults."""
    root.mkdir(parents=True)
    first = Start(case, root, "forked")
    first.after_lock(rng.random() * 0.8 * reference.seconds)
    first.tell(signal.SIGSTOP)
    met, faults = first.has_lock(), []
    if met:
        second = Start(case, root, "forked").finish()
        refused = [line for line in second.error_lines if "is being written by another start" in line]
        if second.status != 2 or len(refused) != 1 or len(second.error_lines) != 1 or second.has_traceback:
            faults.append(f"the second was not refused in one line: {said(second)}")
    first.tell(signal.SIGCONT)
    ended = first.finish()
    faults += [f"the first: {said(ended)}"] if ended.status != 0 else differences(case, reference, root)
    if not faults:
        shutil.rmtree(root)
    return met, faults


def listening(case: Case, reference: Reference, root: Path) -> tuple[list[str], list[str]]:
    """A whole command, undisturbed: the kinds of sockets on which it listened, and faults."""
    root.mkdir(parents=True)
    start = Start(case, root, "whole")
    found = start.listening()
    ended = start.finish()
    faults = [f"listens on {one.protocol} {one.address}:{one.port}" for one in found if not one.is_loopback]
    if case.num_ranks == 1 and found:
        faults.append(f"one rank listens on {len(found)} sockets")
    faults += [said(ended)] if ended.status != 0 else differences(case, reference, root)
    if not faults:
        shutil.rmtree(root)
    return sorted({f"{one.protocol} of {one.address}" for one in found}), faults
