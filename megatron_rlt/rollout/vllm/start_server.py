"""Starts a vLLM server on this machine. It listens on a Unix socket that only this user reaches, and on no port."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rlt.rollout.vllm.client import MODEL_NAME, EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.server_process import ServerProcess, private_folder
from megatron_rlt.rollout.vllm.settings import EngineShape


def start_server(shape: EngineShape, *, log_file: Path, devices: str) -> ServerClient:
    """Start a server with the weights of `shape.folder`, and append its output to `log_file`.

    `devices`: its CUDA_VISIBLE_DEVICES; empty: this process's. Raises EngineLostError, with the end of its log, if it
    ended or did not answer in time.
    """
    config, folder = shape.settings.server, private_folder()
    socket = folder / "http"
    process = ServerProcess(
        command(shape, {"uds": str(socket)}),
        folder=folder,
        log_file=log_file,
        devices=devices,
        unpickles=shape.transfer_backend == "ipc",
    )
    seconds = config.request_timeout_seconds
    server = ServerClient(f"unix:{socket}", api_key=None, timeout_seconds=seconds, process=process)
    try:
        server.wait_until_ready(config.start_timeout_seconds)
    except EngineLostError:
        server.close()
        raise
    return server


def command(shape: EngineShape, endpoint: dict[str, object]) -> list[str]:
    """The server's command line; `endpoint`: the options that say where it listens."""
    options = {"served_model_name": MODEL_NAME, "uvicorn_log_level": "warning"} | endpoint
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
