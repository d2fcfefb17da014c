"""Another user of the machine does not reach the socket of a server that a job started."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rlt.rollout.vllm.server_process import private_folder
from tests.disk.mounts import as_nobody, in_process


@pytest.fixture(autouse=True)
def _as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")


@pytest.fixture
def private() -> Iterator[Path]:
    folder = private_folder()
    yield folder
    shutil.rmtree(folder)


def _connect_as_nobody(path: str) -> str:
    as_nobody()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    return "connected"


def _serve(folder: Path) -> tuple[socket.socket, str]:
    """A socket that anybody may use who comes so far."""
    server, path = socket.socket(socket.AF_UNIX), str(folder / "http")
    server.bind(path)
    Path(path).chmod(0o777)
    server.listen()
    return server, path


def test_a_servers_socket_is_closed_to_others(private: Path) -> None:
    server, path = _serve(private)
    assert in_process(_connect_as_nobody, path).startswith("PermissionError: ")
    private.chmod(0o755)
    assert in_process(_connect_as_nobody, path) == "connected"  # the folder alone keeps them off
    server.close()
