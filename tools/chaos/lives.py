"""One run folder's life: its command is killed and started again until it ends, and what it wrote is compared."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.chaos.cases import Case
from tools.chaos.kills import LABELS, Moment
from tools.chaos.outcome import Results, leftovers, repeated_steps
from tools.chaos.starts import Ended, Kind, Start

AT_RANDOM = "random moment"
_TAIL = 600


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a case."""

    results: Results
    counts: dict[str, int]  # operations on files by label
    seconds: float  # from its lock to its end
    num_bytes: int


@dataclass
class Life:
    """What became of one root."""

    kills: dict[str, int] = field(default_factory=dict)  # by what they were aimed at
    faults: list[str] = field(default_factory=list)


def live(
    case: Case, reference: Reference, kind: Kind, root: Path, rng: random.Random, *, max_kills: int, seconds: float
) -> Life:
    """Kill the command up to so many times, let it end, and compare. `seconds`: of a start, behind its lock."""
    life = Life()
    root.mkdir(parents=True)
    for _ in range(max_kills):
        aim, ended = _disturbed(case, reference, kind, root, rng, seconds)
        if not ended.was_killed:
            if ended.status != 0:
                life.faults.append(f"{aim}: {said(ended)}")
                return life
            break
        life.kills[aim] = life.kills.get(aim, 0) + 1
        if case.ends_once and case.results(root):
            break
    else:
        ended = Start(case, root, kind).finish()
        if ended.status != 0:
            life.faults.append(f"the last start: {said(ended)}")
            return life
    life.faults += differences(case, reference, root)
    if not life.faults:
        shutil.rmtree(root)
    return life


def _disturbed(
    case: Case, reference: Reference, kind: Kind, root: Path, rng: random.Random, seconds: float
) -> tuple[str, Ended]:
    """One start with a kill in wait for it; it may end before."""
    aims = [AT_RANDOM, *(label for label in LABELS if kind == "forked" and reference.counts[label] > 0)]
    aim = rng.choice(aims)
    if aim != AT_RANDOM:
        # A start that resumes has fewer operations: half of the moments lie in the first half.
        number = rng.randint(1, rng.choice((reference.counts[aim], (reference.counts[aim] + 1) // 2)))
        return aim, Start(case, root, kind, Moment(aim, number)).finish()
    start = Start(case, root, kind)
    start.after_lock(rng.random() * seconds)
    start.tell(signal.SIGKILL)
    return aim, start.finish()


def undisturbed(case: Case, root: Path) -> Reference:
    """Run a case once, forked, with its operations counted. Raises RuntimeError if it fails."""
    root.mkdir(parents=True)
    start = Start(case, root, "forked")
    start.after_lock(0.0)
    begun = time.monotonic()
    ended = start.finish()
    seconds = time.monotonic() - begun
    if ended.status != 0:
        raise RuntimeError(f"{case.name}, undisturbed: {said(ended)}")
    results, num_bytes = case.results(root), sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    shutil.rmtree(root)
    return Reference(results, ended.counts, seconds, num_bytes)


def differences(case: Case, reference: Reference, root: Path) -> list[str]:
    """What of an ended run is not as in the undisturbed one, or was left lying about; none is a pass."""
    try:
        found = case.results(root)
    except (OSError, ValueError) as error:
        return [f"unreadable: {error}"]
    names = sorted(found.keys() | reference.results.keys())
    unequal = [name for name in names if found.get(name) != reference.results.get(name)]
    faults = [f"differs: {name}" for name in unequal] + repeated_steps(root)
    # A convert that was killed behind its rename is not started again, so that nobody swept.
    return faults + ([] if case.ends_once else [f"left behind: {name}" for name in leftovers(root)])


def said(ended: Ended) -> str:
    """Status and the end of what was printed."""
    return f"status {ended.status}: {ended.printed[-_TAIL:]}"
