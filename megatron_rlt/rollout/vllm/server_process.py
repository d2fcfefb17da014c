"""A vLLM server that this process started, with its guard and its private folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rlt.parallel.environment import server_environment

_LOG_LINES = 5  # of a dead server, in the error
_LOG_BYTES = 20_000
# The path of a Unix socket has at most 107 bytes, and vLLM's own have 36 below the folder.
_MAX_PARENT_BYTES = 45


def private_folder() -> Path:
    """A new folder that nobody else may open, of mode 0700, for sockets and other temporary files of a server."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="megatron-rlt-", dir=parent if len(parent) <= _MAX_PARENT_BYTES else "/tmp"))


class ServerProcess:
    """A server that this process started, and may therefore end."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        log_file: Path,
        devices: str,
        unpickles: bool,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            folder: from `private_folder`; receives the server's temporary files, and is removed with it.
            devices: its CUDA_VISIBLE_DEVICES; empty: this process's.
            unpickles: whether it accepts pickled objects, with which whoever reaches it can run any code.
            api_key: that its middleware demands; None: it listens on a Unix socket.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = log_file
        on_cpu = not torch.cuda.is_available()
        environment = server_environment(devices, folder, on_cpu=on_cpu, unpickles=unpickles, api_key=api_key)
        with log_file.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlt.rollout.vllm.server_guard", str(folder), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        """Whether the server still runs."""
        return self._guard.poll() is None

    def last_words(self) -> str:
        """The end of its log, as one line."""
        with self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - _LOG_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines
        return " | ".join(errors[-_LOG_LINES:])

    def stop(self) -> None:
        """End the server with all its processes, and wait until they are gone, even if its guard was killed."""
        assert self._guard.stdin is not None, "the guard was started with a pipe"
        assert self._guard.stdout is not None, "the guard was started with a pipe"
        self._guard.stdin.close()
        self._guard.stdout.read()  # ends with the last of the two guards
        self._guard.wait()
