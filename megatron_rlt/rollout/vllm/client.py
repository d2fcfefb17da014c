"""One vLLM server: started and watched by this process, or found at an address; and what it is asked over HTTP.

Token ids go in and come out. Everything that can mean that the server is gone or wrong (no connection, a time-out, a
status of 500, a completion it gave up) is an `EngineLostError`: the caller knows whether to ask again.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import torch

from megatron_rlt.parallel.environment import server_environment

MODEL_NAME = "policy"


_CONNECT_SECONDS = 5.0


_HEALTH_SECONDS = 10.0


_POLL_SECONDS = 0.5


_LEAVE_SECONDS = 60.0  # until a server whose sender has hung up notices, in the middle of a bucket


_LEAVING: tuple[tuple[str, Any], ...] = (
    ("/shutdown_weight_transfer_engine", None),
    ("/update_weights", {"update_info": {}}),
    ("/shutdown_weight_transfer_engine", None),
)


_PORTS = {"http": 80, "https": 443}


_LOG_LINES = 5  # of a dead server, in the error


_LOG_BYTES = 20_000


class EngineLostError(RuntimeError):
    """The sampling engine did not do its work and may be gone; asking again is safe."""


@dataclass(frozen=True, eq=False)
class ServedChoice:
    """One completion as a server gave it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


class ServerProcess:
    """A server that this process starts and ends; nothing else is ever ended."""

    def __init__(self, command: Sequence[str], *, log_file: Path, devices: str, unpickles: bool) -> None:
        """
        Args:
            devices: its CUDA_VISIBLE_DEVICES; empty: as here.
            unpickles: whether it takes Python objects from whoever reaches it, which lets them run anything.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = log_file
        with log_file.open("ab") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "megatron_rlt.rollout.vllm.server_guard", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(devices, on_cpu=not torch.cuda.is_available(), unpickles=unpickles),
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
        told = [line for line in lines if "Error" in line] or lines
        return " | ".join(told[-_LOG_LINES:])

    def stop(self) -> None:
        """End it with all its processes, and wait until they are gone."""
        assert self._guard.stdin is not None, "the guard was started with a pipe"
        self._guard.stdin.close()
        self._guard.wait()


class VllmServer:
    """What a server can be asked."""

    def __init__(
        self, address: str, *, api_key: str | None, timeout_seconds: float, process: ServerProcess | None
    ) -> None:
        """
        Args:
            address: such as `http://127.0.0.1:20000`.
            timeout_seconds: of one request.
            process: the server's, if it belongs to this job.
        """
        self.address, self.process, self._timeout_seconds = address, process, timeout_seconds
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        # The address is the job's own or the user's word: no proxy of the environment stands between.
        self._client = httpx2.Client(base_url=address, headers=headers, limits=limits, trust_env=False)

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Return once it answers; raises EngineLostError if it dies first or takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            if self.process is not None and not self.process.is_alive:
                raise EngineLostError(
                    f"vLLM's server ended while it started: {self.process.last_words()} (log: {self.process.log_file})"
                )
            try:
                self._send("GET", "/health", None, timeout_seconds=_HEALTH_SECONDS)
            except EngineLostError as error:
                if time.monotonic() > deadline:
                    raise EngineLostError(f"not ready after {timeout_seconds:g} s: {error}") from error
            else:
                return
            time.sleep(_POLL_SECONDS)

    def answers(self) -> bool:
        """Whether it is alive and well now."""
        if self.process is not None and not self.process.is_alive:
            return False
        try:
            self._send("GET", "/health", None, timeout_seconds=_HEALTH_SECONDS)
        except EngineLostError:
            return False
        return True

    def check_model(self, max_tokens: int) -> None:
        """Raise ValueError if it serves nothing that reads `max_tokens` tokens."""
        models = self._send("GET", "/v1/models", None)["data"]
        fitting = [model for model in models if model["id"] == MODEL_NAME and model["max_model_len"] >= max_tokens]
        if not fitting:
            served = ", ".join(f"{model['id']} (max_model_len {model['max_model_len']})" for model in models)
            raise ValueError(
                f"rollout.vllm.server.addresses: {self.address} serves {served}; it must serve the policy as"
                f" `--served-model-name {MODEL_NAME}` with --max-model-len of at least {max_tokens}"
            )

    def complete(self, prompt: Sequence[int], settings: Mapping[str, Any], *, n: int, seed: int) -> list[ServedChoice]:
        """`n` completions of one prompt, in the server's order of their seeds.

        Raises:
            EngineLostError: also if the server gave one up (`abort`), which it does with status 200.
        """
        body = {"model": MODEL_NAME, "prompt": list(prompt), "n": n, "seed": seed, "return_token_ids": True}
        answer = self._send("POST", "/v1/completions", body | dict(settings))
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        ended = [choice["finish_reason"] for choice in choices]
        if len(choices) != n or any(reason not in ("stop", "length") for reason in ended):
            raise EngineLostError(f"{self.address} gave {len(choices)} of {n} completions, which ended with {ended}")
        return [
            ServedChoice(
                tuple(choice["token_ids"]),
                tuple(choice["logprobs"]["token_logprobs"]),
                choice["finish_reason"],
            )
            for choice in choices
        ]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of all tokens but the first, at temperature 1."""
        body = {"model": MODEL_NAME, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0}
        (choice,) = self._send("POST", "/v1/completions", body | {"prompt_logprobs": 0})["choices"]
        rows = choice["prompt_logprobs"][1:]
        return [float(row[str(token)]["logprob"]) for row, token in zip(rows, token_ids[1:], strict=True)]

    def load_folder(self, folder: Path, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder that the server can read; nothing runs meanwhile."""
        self.pause()
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
        self.resume(version)

    def pause(self) -> None:
        """Let what runs end, and begin nothing."""
        self.post("/pause?mode=wait", None)

    def resume(self, version: int) -> None:
        """Forget what other weights cached, take the version of these, and go on."""
        self.post("/reset_prefix_cache", None)
        self.post("/update_weight_version", {"new_version": str(version)})
        self.post("/resume", None)

    def post(self, path: str, body: Any, *, timeout_seconds: float | None = None) -> None:  # noqa: ANN401
        """Have something done whose answer says nothing. Raises as `complete`, and ValueError if it is refused."""
        self._send("POST", path, body, timeout_seconds=timeout_seconds)

    def num_workers(self) -> int:
        """That hold its weights together."""
        return int(self._send("GET", "/get_world_size", None)["world_size"])

    def leave_transfer(self) -> bool:
        """End a weight transfer that broke, on the server's side; False: it cannot, and must start again."""
        seconds = min(self._timeout_seconds, _LEAVE_SECONDS)
        # A server in the middle of an update does not let go. An update of nothing fails, and ends it.
        for path, body in _LEAVING:
            try:
                self.post(path, body, timeout_seconds=seconds)
            except EngineLostError:
                if not self.answers():
                    return False
            else:
                return True
        return False

    def local_host(self) -> str:
        """This machine's address on the way to the server, by which the server finds it, too."""
        url = urlsplit(self.address)
        port = url.port or _PORTS[url.scheme]
        try:
            with socket.create_connection((url.hostname, port), _CONNECT_SECONDS) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            raise EngineLostError(f"{self.address}: {error}") from error

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        """What `ShownWeights.checksums_held` says on each of its workers; only of a server started with that class."""
        rpc = {"method": "checksums_held", "args": [list(names)]}
        return list(self._send("POST", "/collective_rpc", rpc)["results"])

    def weight_version(self) -> str:
        """What the last sync called the weights."""
        return str(self._send("GET", "/weight_info", None)["weight_version"])

    def close(self) -> None:
        """Hang up, and end the server if it is this job's."""
        self._client.close()
        if self.process is not None:
            self.process.stop()

    def _send(self, method: str, path: str, body: Any, *, timeout_seconds: float | None = None) -> Any:  # noqa: ANN401
        """The answer's JSON."""
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            response = self._client.request(
                method, path, json=body, timeout=httpx2.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None)
            )
        except httpx2.TransportError as error:
            raise EngineLostError(f"{self.address}{path}: {type(error).__name__} {error}") from error
        told = " ".join(response.text.split())[:500]
        if response.status_code >= 500:
            raise EngineLostError(f"{self.address}{path}: status {response.status_code}: {told}")
        if response.status_code >= 400:
            raise ValueError(
                f"rollout.vllm.server: {self.address}{path} refuses (status {response.status_code}): {told}. A server"
                " at an address must run with VLLM_SERVER_DEV_MODE=1, and api_key_file hold its key if it has one"
            )
        return response.json() if response.content else None
