"""The guard's only promise: no process of a server outlives its trainer, however either of them ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlt.rollout.vllm.client import ServerProcess
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
    """Starts a server, and waits, stops it or ends."""
    command = [sys.executable, "-c", SERVER, str(folder / "worker")]
    process = ServerProcess(command, log_file=folder / "log", devices="", unpickles=False)
    while not (folder / "worker").exists() or not (folder / "worker").read_text():
        time.sleep(0.05)
    (folder / "guard").write_text(str(process._guard.pid))
    if then == "stop":
        process.stop()
        assert not process.is_alive
    time.sleep(600 if then == "wait" else 0)


def _start(folder: Path, then: str) -> Any:
    process = forkserver().Process(target=trainer, args=(folder, then))
    process.start()
    return process


def _processes(folder: Path) -> list[psutil.Process]:
    """The guard and all beneath it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (folder / "guard").exists() or not (folder / "guard").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    guard = psutil.Process(int((folder / "guard").read_text()))
    found = [guard, *guard.children(recursive=True)]
    assert len(found) == 3, "guard, server and worker"
    assert int((folder / "worker").read_text()) in [process.pid for process in found]
    return found


def _assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=_PATIENCE_SECONDS)
    assert alive == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_nothing_running(tmp_path: Path, signal_number: signal.Signals) -> None:
    process = _start(tmp_path, "wait")
    processes = _processes(tmp_path)
    os.kill(process.pid, signal_number)
    process.join()
    _assert_gone(processes)


def test_a_killed_server_takes_its_workers_along_and_the_trainer_sees_it(tmp_path: Path) -> None:
    process = _start(tmp_path, "wait")
    guard, server, *_ = processes = _processes(tmp_path)
    os.kill(server.pid, signal.SIGKILL)
    _assert_gone(processes[1:])
    assert process.is_alive(), "the trainer goes on"
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while guard.status() != psutil.STATUS_ZOMBIE:  # it has ended, for its parent to see
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()


def test_a_server_that_is_stopped_is_gone_when_the_call_returns(tmp_path: Path) -> None:
    process = _start(tmp_path, "stop")
    process.join(_PATIENCE_SECONDS)
    assert process.exitcode == 0
    worker = int((tmp_path / "worker").read_text())
    assert not psutil.pid_exists(worker)
