"""The guards' only promise: no process of a server outlives its trainer or a guard, however any of them ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlt.rollout.vllm.server_process import ServerProcess, private_folder
from tests.ranks import forkserver

# A server with a worker that has left its session and ignores SIGTERM, as the worst ones do.
SERVER = """
import pathlib, signal, subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(f"{child.pid}")
time.sleep(600)
"""
_PATIENCE_SECONDS = 30.0


def trainer(folder: Path, then: str) -> None:
    """Starts a server, and waits, stops it or ends; `stop late`: when it sees that the guard is gone."""
    command = [sys.executable, "-c", SERVER, str(folder / "worker")]
    private = private_folder()
    (folder / "private").write_text(str(private))
    process = ServerProcess(command, folder=private, log_file=folder / "log", devices="", unpickles=False)
    while not (folder / "worker").exists() or not (folder / "worker").read_text():
        time.sleep(0.05)
    (folder / "guard").write_text(str(process._guard.pid))
    while then == "stop late" and process.is_alive:
        time.sleep(0.01)
    if then.startswith("stop"):
        process.stop()
        assert not process.is_alive
    time.sleep(600 if then == "wait" else 0)


def _start(folder: Path, then: str) -> Any:
    process = forkserver().Process(target=trainer, args=(folder, then))
    process.start()
    return process


def _processes(folder: Path) -> list[psutil.Process]:
    """The outer guard, the inner one, the server and its worker."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (folder / "guard").exists() or not (folder / "guard").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    guard = psutil.Process(int((folder / "guard").read_text()))
    found = [guard, *guard.children(recursive=True)]
    assert len(found) == 4, "two guards, server and worker"
    assert int((folder / "worker").read_text()) == found[-1].pid
    return found


def _assert_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(_runs(process) for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """A zombie has ended, for its parent to see."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_nothing_running(tmp_path: Path, signal_number: signal.Signals) -> None:
    process = _start(tmp_path, "wait")
    processes = _processes(tmp_path)
    os.kill(process.pid, signal_number)
    process.join()
    _assert_gone(processes)


@pytest.mark.parametrize(
    ("guard", "signal_number"),
    [(0, signal.SIGTERM), (0, signal.SIGHUP), (0, signal.SIGKILL), (1, signal.SIGKILL)],
    ids=["asked", "hung up", "outer killed", "inner killed"],
)
def test_a_guard_that_ends_leaves_nothing_running_and_stopping_waits_for_it(
    tmp_path: Path, guard: int, signal_number: signal.Signals
) -> None:
    process = _start(tmp_path, "stop late")
    processes = _processes(tmp_path)
    os.kill(processes[guard].pid, signal_number)
    process.join(_PATIENCE_SECONDS)
    assert process.exitcode == 0
    assert [one for one in processes if _runs(one)] == [], "a second server never runs beside the first"
    assert not Path((tmp_path / "private").read_text()).exists()


def test_a_server_that_loses_both_guards_at_once_is_killed(tmp_path: Path) -> None:
    process = _start(tmp_path, "wait")
    outer, inner, server, worker = _processes(tmp_path)
    for guard in (outer, inner):
        guard.suspend()
    for guard in (outer, inner):
        guard.kill()
    _assert_gone([outer, inner, server])
    worker.kill()  # only the guards could have
    Path((tmp_path / "private").read_text()).rmdir()
    process.kill()
    process.join()


def test_a_killed_server_takes_its_workers_along_and_the_trainer_sees_it(tmp_path: Path) -> None:
    process = _start(tmp_path, "wait")
    processes = _processes(tmp_path)
    os.kill(processes[2].pid, signal.SIGKILL)
    _assert_gone(processes)
    assert process.is_alive(), "the trainer goes on"
    process.kill()
    process.join()


def test_a_server_that_is_stopped_is_gone_when_the_call_returns(tmp_path: Path) -> None:
    process = _start(tmp_path, "stop")
    process.join(_PATIENCE_SECONDS)
    assert process.exitcode == 0
    worker = int((tmp_path / "worker").read_text())
    assert not psutil.pid_exists(worker)
