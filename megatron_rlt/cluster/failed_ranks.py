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
    if first is None or first[3].startswith("Exited with exit code"):  # those recorded themselves, if they could
        return list(failures.values())
    rank = int(first[2])
    if rank not in failures:
        message = f"{first[3].lower()} by a signal from outside, such as the system when it runs out of memory"
        seconds = records.last_sign(rank) or 0.0
        failures[rank] = Failure(rank, records.phase(rank), Kind.KILLED, message, "", seconds)
    return list(failures.values())
