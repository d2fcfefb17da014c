"""The program as an executable that is forked from a process which has imported everything once.

A test whose claim is about how processes start uses the real command instead.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tools.preloaded import forkserver, run_command

_MAX_REQUEST_BYTES = 1 << 20
_PROGRAM = """#!{python} -SE
import json, os, socket, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "megatron_rlt"]:
    del arguments[:2]
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect("{address}")
    socket.send_fds(server, [json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
"""


@contextmanager
def preloaded_program(
    folder: Path, text: str = _PROGRAM, serve: Callable[[str, Any], None] | None = None
) -> Iterator[Path]:
    """An executable for shells and `subprocess` that stands for `megatron-rlt` and for `python -m megatron_rlt`.

    It hands arguments, folder, environment and open files to a preloaded process; signals are not handed on.
    """
    program, address = folder / "megatron-rlt", folder / "socket"
    program.write_text(text.format(python=sys.executable, address=address))
    program.chmod(0o755)
    ready = forkserver().Event()
    server = forkserver().Process(target=serve or _serve, args=(str(address), ready), daemon=True)
    server.start()
    assert ready.wait(timeout=120), "the preloaded process does not listen"
    yield program
    server.kill()


def _serve(address: str, ready: Any) -> None:
    """Fork one process per request until killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        ready.set()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _answer(connection: socket.socket) -> None:
    """Run what one program was called with, and tell it the exit status."""
    request, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
    arguments, folder, environment = json.loads(request)
    try:
        status = run_command(arguments, Path(folder), environment, dict(enumerate(descriptors)))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(str(status).encode())
    os._exit(0)
