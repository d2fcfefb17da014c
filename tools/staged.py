"""A chain of `megatron-rlt` commands: its plan, a run that goes on where it stopped, and the seconds of each stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from megatron_rlt.config.display import NumberTable

SECONDS = "stages.json"
"""In the chain's folder: wall time by stage."""


@dataclass(frozen=True)
class Stage:
    """One command of a chain."""

    name: str  # unique
    title: str
    command: str
    config: Path
    result: Path  # exists once the stage is done
    overrides: tuple[str, ...]
    expected_seconds: int  # on two quiet cores
    beside: bool = False  # runs at the same time as the stage before it; each is of one rank

    @property
    def arguments(self) -> list[str]:
        """What follows `megatron-rlt`."""
        return [self.command, str(self.config), *self.overrides]


def run_stages(folder: Path, stages: Sequence[Stage], console: Console) -> int:
    """Run what is not done yet, in the stages' order. Returns the exit status of the first that failed, or 0."""
    numbers = {stage.name: f"{number}/{len(stages)}" for number, stage in enumerate(stages, start=1)}
    for group in side_by_side(stages):
        for stage in group:
            console.rule(f"{numbers[stage.name]}. {stage.title}", align="left")
            if stage.result.exists():
                console.print(f"done before: {stage.result}")
        status = _run(folder, [stage for stage in group if not stage.result.exists()])
        if status != 0:
            return status
    return 0


def plan(stages: Sequence[Stage]) -> NumberTable:
    """What will run, and for how long on two quiet cores."""
    table = NumberTable("Plan", ("stage", "command", "seconds"), text_columns=2)
    for number, stage in enumerate(stages, start=1):
        seconds = "done" if stage.result.exists() else str(stage.expected_seconds)
        table.add_line(f"{number:>2}. {stage.title}", stage.command, seconds)
    table.add_section()
    table.add_line("in all, on two quiet cores", "", f"{seconds_ahead(stages)}")
    return table


def seconds_ahead(stages: Sequence[Stage]) -> int:
    """Expected seconds of what is not done yet."""
    ahead = [[s.expected_seconds for s in group if not s.result.exists()] for group in side_by_side(stages)]
    return sum(max(seconds, default=0) for seconds in ahead)


def side_by_side(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in their order, those that run at the same time together."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if stage.beside:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def read_seconds(folder: Path) -> dict[str, float]:
    """Wall time by stage, of all starts together."""
    file = folder / SECONDS
    return json.loads(file.read_text()) if file.is_file() else {}


def _run(folder: Path, group: Sequence[Stage]) -> int:
    """Run stages at the same time. The first one's lines are seen as they come, the others' once it has ended."""
    start = time.monotonic()
    threads = {} if len(group) < 2 else {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        outputs = [stack.enter_context(TemporaryFile()) for _ in group[1:]]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_rlt", *stage.arguments], stdout=output, env=os.environ | threads
            )
            for stage, output in zip(group, [None, *outputs], strict=False)
        ]
        for stage, process in zip(group, running, strict=True):
            if process.wait() != 0:
                _set_aside(stage.result)
            _add_seconds(folder, stage, time.monotonic() - start)
        for output in outputs:
            output.seek(0)
            sys.stdout.write(output.read().decode())
    return max((process.returncode for process in running), key=abs, default=0)


def _set_aside(result: Path) -> None:
    """Rename what a command wrote before it failed, as `parity` does, so that the next start runs the stage again."""
    if result.exists():
        aside = result.with_name(f"{result.name}.failed")
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        result.rename(aside)


def _add_seconds(folder: Path, stage: Stage, seconds: float) -> None:
    """Keep a stage's wall time; that of a stage which was stopped and goes on later adds up."""
    known = read_seconds(folder)
    known[stage.name] = round(known.get(stage.name, 0.0) + seconds, 1)
    (folder / SECONDS).write_text(json.dumps(known, indent=2) + "\n")
