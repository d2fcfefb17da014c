"""How the ranks of an attempt on a cluster failed: what they recorded, and what srun says of those that could not."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from megatron_rlt.launch.failures import Failure, Kind, failure_of_silence
from megatron_rlt.launch.records import RANKS, Records

_QUIET_SECONDS = 3.0  # watchdogs give a sign about once a second
SRUN_LOG = "srun.log"
# Such as `srun: error: node3: task 5: Killed`, or `tasks 4-7`. What follows the first one is srun's own doing.
_ENDED = re.compile(r"^srun: error: ([^:]+): tasks? (\d+)[\d,-]*: (.+)$", re.MULTILINE)
_LOST_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)


def ranks_of(attempt: Path) -> list[int]:
    """The ranks that have started."""
    numbers = (file.name.removeprefix("host-") for file in (attempt / RANKS).glob("host-*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def failures_of(attempt: Path) -> list[Failure]:
    """All failures of an attempt's ranks."""
    records = Records(attempt / RANKS)
    failures = records.failures()
    if any(failure.kind is Kind.STALL for failure in failures.values()):
        failures |= _silent(attempt, failures.keys())
    log = attempt / SRUN_LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    if lost := _LOST_NODE.search(text):
        return [*failures.values(), Failure(-1, "", Kind.KILLED, f"node {lost[1]} failed", "", 0.0)]
    first = _ENDED.search(text)
    if first is None or (rank := int(first[2])) in failures:
        return list(failures.values())
    how, seconds, phase = first[3].lower(), records.last_sign(rank) or 0.0, records.phase(rank)
    if how.startswith("exited"):
        failures[rank] = Failure(rank, phase, Kind.VANISHED, f"{how}, no reason given", "", seconds)
    else:
        message = f"{how} by a signal from outside, such as the system's when memory runs out"
        failures[rank] = Failure(rank, phase, Kind.KILLED, message, "", seconds)
    return list(failures.values())


def _silent(attempt: Path, recorded: Collection[int]) -> dict[int, Failure]:
    """Ranks that gave no sign while others still did: stopped, or hanging in the system, they record nothing."""
    records = Records(attempt / RANKS)
    signs = {rank: sign for rank in ranks_of(attempt) if (sign := records.last_sign(rank)) is not None}
    newest = max(signs.values(), default=0.0)
    return {
        rank: failure_of_silence(newest - sign, rank=rank, phase=records.phase(rank))
        for rank, sign in signs.items()
        if rank not in recorded and not records.is_done(rank) and newest - sign > _QUIET_SECONDS
    }
