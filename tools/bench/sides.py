"""The processes of one side of a comparison, seen from the bench: started once, then asked for one step at a time."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.trl_environment import ROOT
from tools.bench.turns import REPORT, give_turn

_TAIL_CHARACTERS = 3000


@dataclass(frozen=True)
class SideTurns:
    """What a side reported."""

    seconds: list[float]  # a step, of its slowest process
    processor_seconds: list[float]  # a step, of all threads of all its processes
    phases: list[dict[str, float]]  # seconds, of its first process
    mean_rewards: list[float]
    peak_bytes: int  # over all its processes

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def median_phase(self, name: str) -> float:
        return statistics.median(phases[name] for phases in self.phases)


@dataclass
class Side:
    """Processes that wait for their turn."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]
    reports: list[list[dict[str, Any]]] = field(default_factory=list)

    def take_turn(self) -> None:
        """One step on all processes together."""
        for process in self.processes:
            assert process.stdin is not None
            give_turn(process.stdin)
        self.reports.append(self.read())

    def read(self) -> list[dict[str, Any]]:
        """One report of every process. Raises RuntimeError with what a process that ended said."""
        return [self._read(process, log) for process, log in zip(self.processes, self.logs, strict=True)]

    def turns(self, *, after: int) -> SideTurns:
        """All turns but the first `after`."""
        kept = self.reports[after:]
        return SideTurns(
            seconds=[max(report["seconds"] for report in turn) for turn in kept],
            processor_seconds=[sum(report["processor_seconds"] for report in turn) for turn in kept],
            phases=[turn[0]["phases"] for turn in kept],
            mean_rewards=[turn[0]["mean_reward"] for turn in kept],
            peak_bytes=sum(report["peak_bytes"] for report in kept[-1]),
        )

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    @staticmethod
    def _read(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(REPORT):
                report: dict[str, Any] = json.loads(line.removeprefix(REPORT))
                return report
        raise RuntimeError(f"a side ended early:\n{log.read_text()[-_TAIL_CHARACTERS:]}")


def start_alone(command: Sequence[str], *, name: str, num_threads: int, folder: Path) -> Side:
    """A side of one process, outside any job; returns when it is ready."""
    return _started([_start(command, folder / f"{name}.log", {"OMP_NUM_THREADS": str(num_threads)})])


def start_ranks(command: Sequence[str], *, name: str, num_ranks: int, num_threads: int, folder: Path) -> Side:
    """A side that is one job of `num_ranks`, each with `num_threads`; returns when it is ready."""
    port = _free_port()
    job = {"OMP_NUM_THREADS": str(num_threads), "WORLD_SIZE": str(num_ranks)}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return _started(
        [
            _start(command, folder / f"{name}-{rank}.log", job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(num_ranks)
        ]
    )


def _start(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> tuple[subprocess.Popen[str], Path]:
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        )
    return process, log


def _started(processes: Sequence[tuple[subprocess.Popen[str], Path]]) -> Side:
    side = Side([process for process, _ in processes], [log for _, log in processes])
    try:
        side.read()
    except RuntimeError:
        side.close()
        raise
    return side


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
