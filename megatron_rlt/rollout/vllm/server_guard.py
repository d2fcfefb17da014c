"""Runs a server in a session of its own, and ends all its processes when the trainer, the server or the guard ends.

A killed vLLM server leaves its engine and worker processes behind, and so does a killed trainer its servers. So two
small processes guard a server, and each does the other's work if that one is killed:

- The outer guard ends when the trainer does, however it dies: its standard input is a pipe that closes then.
- The inner guard is its child and the server's parent. The system tells it when the outer one dies.

Both adopt what the processes beneath them leave behind. The system kills the server if the inner guard dies. Their
standard output stays open until both have ended, and with them the server. Started as
`python -m megatron_rlt.rollout.vllm.server_guard FOLDER COMMAND...`; FOLDER is removed at the end.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_WATCHED = (*_ENDING, signal.SIGCHLD)
_PATIENCE_SECONDS = 5.0  # between asking to end and killing
# The inner guard asks and kills twice: the server, then what it left behind.
_OUTER_PATIENCE_SECONDS = 4 * _PATIENCE_SECONDS
_NUM_SWEEPS = 3  # a process that was just adopted may be missed once


def main() -> int:
    """Run the server; returns its exit status."""
    folder, *command = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the trainer's; then the pipe ends
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    outer = os.getpid()
    inner = _fork(lambda: _serve(command, folder, outer))
    threading.Thread(target=_end_with_trainer, args=(outer,), daemon=True).start()
    return _watch(inner, folder, _OUTER_PATIENCE_SECONDS)


def _serve(command: list[str], folder: str, outer: int) -> int:
    """The inner guard."""
    _ask_for_a_signal_when_the_parent_dies(signal.SIGTERM)
    if os.getppid() != outer:
        return 1
    os.setsid()  # whoever kills the outer guard's process group does not kill this one, too
    inner = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        _ask_for_a_signal_when_the_parent_dies(signal.SIGKILL)
        if os.getppid() != inner:
            os._exit(1)

    # stdout is the guards' alone; the server's output goes where their stderr goes.
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=prepare
    )
    return _watch(server.pid, folder, _PATIENCE_SECONDS)


def _watch(child: int, folder: str, patience_seconds: float) -> int:
    """Wait for a child, or end it when a signal asks for it; then end what it left behind. Returns its exit status."""
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1)
    deadline: float | None = None
    while True:
        left = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
        received = signal.sigtimedwait(_WATCHED, left)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is None and received is not None and received.si_signo in _ENDING:
            os.kill(child, signal.SIGTERM)
            deadline = time.monotonic() + patience_seconds
        elif deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
    _end_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    return abs(os.waitstatus_to_exitcode(status))


def _fork(run: Callable[[], int]) -> int:
    """Process id of a child that runs a function and exits with its result."""
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        status = run()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _end_with_trainer(guard: int) -> None:
    sys.stdin.buffer.read()  # returns when the other end is gone
    os.kill(guard, signal.SIGTERM)


def _end_descendants() -> None:
    """End the processes that the server left behind: orphans are this process's children now."""
    for _ in range(_NUM_SWEEPS):
        left = psutil.Process().children(recursive=True)
        if not left:
            return
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=_PATIENCE_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_PATIENCE_SECONDS)


def _ask_for_a_signal_when_the_parent_dies(number: signal.Signals) -> None:
    _libc().prctl(_PR_SET_PDEATHSIG, number)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


if __name__ == "__main__":
    sys.exit(main())
