"""`megatron-rlt` for the tasks of a job: forked from a process that has imported everything, and dying with its task.

Signals to the task reach the forked process, and a task that is killed takes it along; otherwise as
`tests/preloaded.py`. A claim about how processes start is made with the real command.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tests.preloaded import preloaded_program
from tools.preloaded import run_command

_MAX_REQUEST_BYTES = 1 << 20
_PROGRAM = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect("{address}")
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [request], [0, 1, 2])
    process = int(server.recv(16))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    status = int(server.recv(16) or -9)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
"""


def program_for_tasks(folder: Path) -> AbstractContextManager[Path]:
    """An executable that stands for `megatron-rlt`."""
    return preloaded_program(folder, _PROGRAM, _serve)


def _serve(address: str, ready: Any) -> None:
    """Per request a process that waits for the one that it forks to do the work."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        ready.set()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _wait_for_work(connection)
            connection.close()


def _wait_for_work(connection: socket.socket) -> None:
    request, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
    process = os.fork()
    if process == 0:
        connection.close()
        os._exit(_work(request, descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(process).encode())
    threading.Thread(target=_kill_with_task, args=(connection, process), daemon=True).start()
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    try:
        connection.send(str(code).encode())
    finally:
        os._exit(0)


def _kill_with_task(connection: socket.socket, process: int) -> None:
    if connection.recv(1) == b"":
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _work(request: bytes, descriptors: list[int]) -> int:
    arguments, folder, environment = json.loads(request)
    if environment.get("RLT_TEST_ODD"):
        _have_another_version()
    try:
        return run_command(arguments, Path(folder), environment, dict(enumerate(descriptors)))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _have_another_version() -> None:
    """As on a node whose software was installed another day."""
    from megatron_rlt.cluster import node_facts

    true = node_facts.version
    node_facts.version = lambda package: "0.0" if package == "transformers" else true(package)
