"""Starts a vLLM server on this machine, on a port that nobody else has."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rlt.parallel.environment import free_port
from megatron_rlt.rollout.vllm.client import MODEL_NAME, EngineLostError, ServerClient, ServerProcess
from megatron_rlt.rollout.vllm.settings import EngineShape

_NUM_PORTS = 3  # somebody may take a port between the look and the server's start


def start_server(shape: EngineShape, *, log_file: Path, devices: str) -> ServerClient:
    """Start a server with the weights of `shape.folder`, and append its output to `log_file`.

    `devices`: its CUDA_VISIBLE_DEVICES; empty: this process's. Raises EngineLostError, with the end of its log, if it
    ended or did not answer in time.
    """
    config = shape.settings.server
    for _ in range(_NUM_PORTS):
        port = free_port()
        process = ServerProcess(
            command(shape, port), log_file=log_file, devices=devices, unpickles=shape.transfer_backend == "ipc"
        )
        address = f"http://127.0.0.1:{port}"
        server = ServerClient(address, api_key=None, timeout_seconds=config.request_timeout_seconds, process=process)
        try:
            server.wait_until_ready(config.start_timeout_seconds)
        except EngineLostError as error:
            server.close()
            if "address already in use" not in str(error).lower():
                raise
            failure = error
        else:
            return server
    raise failure


def command(shape: EngineShape, port: int) -> list[str]:
    """The server's command line. It listens on this machine only: whoever reaches it can replace its weights."""
    options = {"served_model_name": MODEL_NAME, "host": "127.0.0.1", "port": port, "uvicorn_log_level": "warning"}
    words = [word for name, value in (shape.server_options() | options).items() for word in _words(name, value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]


def _words(name: str, value: object) -> list[str]:
    """An option on vLLM's command line."""
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={value}"]
