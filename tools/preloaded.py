"""Processes and commands that begin with the whole package imported, forked from one that imported it once.

Process, ranks and launcher run what a user's run; they are forked where a user's are started anew. A claim about how
processes start is made with the real command instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tools.preload"])


def forkserver() -> Any:  # noqa: ANN401 - the standard library's types of contexts name no queues
    """The context whose processes begin with the whole package imported."""
    return _context


def start_forkserver() -> None:
    """Let the fork server begin to import; whoever needs it first starts it otherwise."""
    ensure_running()


class PreloadedCommand:
    """`megatron-rlt ARGUMENTS` in a session of its own, so that a signal to its group reaches all of it alone."""

    def __init__(
        self, arguments: list[str], *, output: Path, errors: Path, before: Callable[[], None] | None = None
    ) -> None:
        """`output` and `errors` are the files that get what it prints; one file for both is fine.

        `before` is called in its process first; it is pickled.
        """
        arguments_of_process = (arguments, _environment(), output, errors, before)
        self._process = _context.Process(target=_run_alone, args=arguments_of_process)
        self._process.start()
        assert self._process.pid is not None, "it has started"
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit status."""
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"it still runs after {timeout:.0f} s"
        return status


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def _run_alone(
    arguments: list[str],
    environment: Mapping[str, str],
    output: Path,
    errors: Path,
    before: Callable[[], None] | None,
) -> None:
    os.setsid()
    opened = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (output, errors)]
    if before is not None:
        before()
    sys.exit(run_command(arguments, ROOT, environment, dict(zip((1, 2), opened, strict=True))))


def run_command(arguments: list[str], folder: Path, environment: Mapping[str, str], opened: Mapping[int, int]) -> int:
    """The command in this process, with these open files as the descriptors of their keys."""
    for number, descriptor in opened.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    current: Any = multiprocessing.current_process()
    current._identity = ()  # as in a program's first process
    current._config["daemon"] = False  # it has children
    _fork_ranks()
    from megatron_rlt.cli import main

    return main(arguments)


def _fork_ranks() -> None:
    """From now on the launcher in this process forks its ranks: what is imported here is imported there."""
    from megatron_rlt.launch import local_ranks

    local_ranks._START_METHOD = "fork"
