"""How the ranks of an attempt on a cluster failed: what they recorded, and what srun says of those that could not."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_rlt.launch.failures import Failure, Kind
from megatron_rlt.launch.records import RANKS, Records

SRUN_LOG = "srun.log"
# Such as `srun: error: node3: task 5: Killed`, or `tasks 4-7`. What follows the first one is srun's own doing.
_ENDED = re.compile(r"^srun: error: ([^:]+): tasks? (\d+)[\d,-]*: (.+)$", re.MULTILINE)
_LOST_NODE = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)


def failures_of(attempt: Path) -> list[Failure]:
    """All failures of an attempt's ranks."""
    records = Records(attempt / RANKS)
    failures = records.failures()
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
