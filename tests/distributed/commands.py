"""The command line on two ranks, started from a preloaded process, and ended as a cluster ends it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_rlt.checkpoint.folders import list_checkpoints
from megatron_rlt.metrics.writer import METRICS_FILE, read_metrics
from tools.chaos.sockets import ListeningSocket, sockets_while_it_runs
from tools.preloaded import PreloadedCommand

_TIMEOUT_SECONDS = 240.0
_POLL_SECONDS, _POLL_SAVE_SECONDS = 0.02, 0.002  # a step of the tiny model takes a second, a save a tenth of one


@dataclass(frozen=True)
class Attempt:
    """One start of the command on a run folder, once it ended."""

    status: int
    errors: str
    found_step: int  # of the newest complete checkpoint before; 0: none
    first_step: int | None  # the first step it took, if any
    last_metrics_step: int  # last complete line of metrics.jsonl after it


class Command:
    """A command that runs on a folder, in a session of its own, so that a kill reaches all of it and nothing else."""

    def __init__(self, command: str, config: Path, overrides: list[str], output_dir: Path) -> None:
        self._output_dir = output_dir
        self._found_step = newest_step(output_dir)
        self._started = time.time()
        self._log = output_dir.with_name(f"{output_dir.name}-{time.monotonic_ns()}.log")
        arguments = [command, str(config), *overrides, f"output_dir={output_dir}"]
        self._process = PreloadedCommand(arguments, output=Path(os.devnull), errors=self._log)

    def finish(self) -> Attempt:
        """Wait for its end."""
        status = self._process.wait(timeout=_TIMEOUT_SECONDS)
        files = (self._output_dir / "completions").glob("step-*.parquet")
        taken = [step_of(file) for file in files if file.stat().st_mtime > self._started]
        steps = [record["step"] for record in read_metrics(self._output_dir)]
        return Attempt(
            status,
            self._log.read_text(),
            self._found_step,
            min(taken, default=None),
            max(steps, default=0),
        )

    def after_steps(self, count: int, rng: random.Random) -> Command:
        """Wait until it has taken so many steps by itself, and then for a random part of a step."""
        steps: list[dict[str, float]] = []

        def taken() -> bool:
            # Before it resumes, lines of the start before may still be there: they must not be read.
            if not self._has_resumed():
                return False
            steps[:] = read_metrics(self._output_dir)
            return len(steps) >= self._found_step + count

        self._wait_until(taken)
        time.sleep(rng.random() * sum(value for name, value in steps[-1].items() if name.startswith("seconds/")))
        return self

    def listening(self) -> set[ListeningSocket]:
        """All sockets on which it listens until it ends."""
        return sockets_while_it_runs(self._process.pid, lambda: self._process.poll() is None)

    def tell(self, number: signal.Signals) -> Command:
        """Send the command's own process a signal."""
        os.kill(self._process.pid, number)
        return self

    def kill_rank(self, rank: int) -> Command:
        """SIGKILL one of its ranks."""
        ranks = psutil.Process(self._process.pid).children()
        assert len(ranks) == 2, [child.cmdline() for child in ranks]
        sorted(ranks, key=lambda child: child.pid)[rank].kill()
        return self

    def kill(self) -> Command:
        """SIGKILL everything at once, as when the machine goes down."""
        os.killpg(self._process.pid, signal.SIGKILL)
        return self

    def kill_while_it_saves(self) -> Command:
        """SIGKILL everything at a moment when a checkpoint is half written: frozen first, to be sure of it."""
        while True:
            self._wait_until(self._is_saving, _POLL_SAVE_SECONDS)
            os.killpg(self._process.pid, signal.SIGSTOP)
            if self._is_saving():
                return self.kill()
            os.killpg(self._process.pid, signal.SIGCONT)

    def _is_saving(self) -> bool:
        """Whether a checkpoint of this start is half written; one of an earlier, killed start may still lie there."""
        try:
            return any(folder.stat().st_mtime > self._started for folder in half_written(self._output_dir))
        except FileNotFoundError:  # it was completed between the two looks
            return False

    def _has_resumed(self) -> bool:
        """Whether metrics.jsonl is this start's: at the beginning it is cut back to the checkpoint."""
        file = self._output_dir / METRICS_FILE
        return file.is_file() and file.stat().st_mtime > self._started

    def _wait_until(self, condition: Callable[[], bool], poll_seconds: float = _POLL_SECONDS) -> None:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not condition():
            assert self._process.poll() is None, f"it ended by itself:\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self._log.read_text()}"
            time.sleep(poll_seconds)


def half_written(output_dir: Path) -> list[Path]:
    """Temporary folders of a save under way; an older step's is one that is being removed."""
    found = (output_dir / "checkpoints").glob(".step-*.tmp")
    return [folder for folder in found if step_of(folder) > newest_step(output_dir)]


def newest_step(output_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    found = list_checkpoints(output_dir / "checkpoints")
    return step_of(found[-1]) if found else 0


def step_of(path: Path) -> int:
    """The number in `step-000007`, `.step-000007.tmp` or `step-000007.parquet`."""
    return int(path.name.removeprefix(".").removeprefix("step-").split(".")[0])
