"""Runs a server in a session of its own, and ends all its processes when the trainer or the server ends.

A killed vLLM server leaves its engine and worker processes behind, and so does a killed trainer its servers. This
small process adopts them and outlives neither: its standard input is a pipe that closes when the trainer ends, however
it dies. Started as `python -m megatron_rlt.rollout.vllm.server_guard COMMAND...`.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PATIENCE_SECONDS = 5.0  # between asking to end and killing


def main() -> int:
    """Run the server; returns its exit status."""
    command = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the trainer's; then the pipe ends
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    status = server.wait()
    _end_descendants()
    return abs(status)


def _end_with_parent(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()  # returns when the other end is gone
    server.terminate()
    try:
        server.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()


def _end_descendants() -> None:
    """End the processes that the server left behind: orphans are this process's children now."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.terminate()
    _, alive = psutil.wait_procs(left, timeout=_PATIENCE_SECONDS)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_PATIENCE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
