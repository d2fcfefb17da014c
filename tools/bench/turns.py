"""What the sides of a comparison share: the task, and taking turns, so that a busy machine is busy for all of them.

A side is one process or several. Each waits for a line on its standard input, does one step, and prints one line.
Standard library only: one side lives in an environment without this project.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

REPORT = "REPORT "  # libraries print, too
_TURN = "turn\n"


@dataclass(frozen=True)
class Task:
    """One step's work."""

    model: str  # folder of teacher and student: both start from the same weights
    settings: dict[str, Any]  # of `megatron-rlt train`
    questions: list[dict[str, str]]  # question and solution
    texts: list[dict[str, str]]  # the same as `RewardTexts`
    prompt_ids: list[list[int]]  # the teacher's prompts
    num_steps: int

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(file: Path) -> Task:
        return Task(**json.loads(file.read_text()))


def turns() -> Iterator[int]:
    """Say that this process is ready, then count its turns, from 0, until the input ends."""
    report({})
    number = 0
    while sys.stdin.readline() == _TURN:
        yield number
        number += 1


class StepClock:
    """Wall time and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """`seconds`, and `processor_seconds` of all threads: the steadier figure on a busy machine."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "processor_seconds": time.process_time() - self._processor,
        }


def report(values: Mapping[str, Any]) -> None:
    """Print what a turn gave, and the most memory this process has held."""
    print(REPORT + json.dumps({**values, "peak_bytes": peak_resident_bytes()}), flush=True)


def peak_resident_bytes() -> int:
    """Most memory this process held since its program began. `getrusage` would count what its parent held as well."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def give_turn(process_input: IO[str]) -> None:
    """Let a waiting process take its turn."""
    process_input.write(_TURN)
    process_input.flush()
