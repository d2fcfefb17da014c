"""The program's commands, started from the tests' fork server, which has imported everything once.

Process, ranks and launcher run what a user's run; they are forked where a user's are started anew. A test whose
claim is about how processes start uses the real command instead.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ranks import forkserver

ROOT = Path(__file__).parents[1]
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


class PreloadedCommand:
    """`megatron-rlt ARGUMENTS` in a session of its own, so that a signal to its group reaches all of it alone."""

    def __init__(self, arguments: list[str], *, output: Path, errors: Path) -> None:
        """`output` and `errors` are the files that get what it prints; one file for both is fine."""
        self._process = forkserver().Process(target=_run_alone, args=(arguments, _environment(), output, errors))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        status: int | None = self._process.exitcode
        return status

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit status."""
        self._process.join(timeout)
        status = self.poll()
        assert status is not None, f"it still runs after {timeout:.0f} s"
        return status


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


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def _run_alone(arguments: list[str], environment: Mapping[str, str], output: Path, errors: Path) -> None:
    os.setsid()
    opened = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (output, errors)]
    sys.exit(_main(arguments, ROOT, environment, dict(zip((1, 2), opened, strict=True))))


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
        status = _main(arguments, Path(folder), environment, dict(enumerate(descriptors)))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(str(status).encode())
    os._exit(0)


def _main(arguments: list[str], folder: Path, environment: Mapping[str, str], opened: Mapping[int, int]) -> int:
    """The command in this process, with these open files as the descriptors of their keys."""
    for number, descriptor in opened.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.current_process()._identity = ()  # type: ignore[attr-defined]  # as in a program's first process
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has children
    _fork_ranks()
    from megatron_rlt.cli import main

    return main(arguments)


def _fork_ranks() -> None:
    """From now on the launcher in this process forks its ranks: what is imported here is imported there."""
    from megatron_rlt.launch import local_ranks

    local_ranks._START_METHOD = "fork"
