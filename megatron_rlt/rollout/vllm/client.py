"""HTTP client of one vLLM server, which this process started or which runs at an address.

Token ids go in and come out. Everything that can mean that the server is gone or broken (no connection, a time-out, a
status of 500, an aborted completion) is an `EngineLostError`: the caller knows whether to ask again.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from megatron_rlt.rollout.vllm.server_process import ServerProcess

MODEL_NAME = "policy"
_CONNECT_SECONDS = 5.0
_HEALTH_SECONDS = 10.0
_POLL_SECONDS = 0.5
_LEAVE_SECONDS = 60.0  # until a server notices, in the middle of a bucket, that its sender has hung up
_LEAVING: tuple[tuple[str, Any], ...] = (
    ("/shutdown_weight_transfer_engine", None),
    ("/update_weights", {"update_info": {}}),
    ("/shutdown_weight_transfer_engine", None),
)
_PORTS = {"http": 80, "https": 443}
_UNIX = "unix:"
_LOCALHOST = "127.0.0.1"
_REFUSALS = (401, 403)
# Paths of vLLM's that its list of paths does not name, or that are worst if they are open.
_PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/weight_info", "/collective_rpc")


class EngineLostError(RuntimeError):
    """The sampling engine did not do its work and may be gone; asking again is safe."""


@dataclass(frozen=True, eq=False)
class ServerCompletion:
    """One completion in a server's answer."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


class ServerClient:
    """The requests that a server answers."""

    def __init__(
        self, address: str, *, api_key: str | None, timeout_seconds: float, process: ServerProcess | None
    ) -> None:
        """
        Args:
            address: such as `http://127.0.0.1:20000`, or `unix:` and the path of a socket.
            timeout_seconds: of one request.
            process: None: the server runs at an address and is not this job's.
        """
        self.address, self.process, self._timeout_seconds = address, process, timeout_seconds
        self.is_lost = False
        """Whether it failed and must restart before it is asked again, whatever it says of itself."""
        self._api_key = api_key
        self._client = self._connected({} if api_key is None else {"Authorization": f"Bearer {api_key}"})

    def wait_until_ready(self, timeout_seconds: float) -> None:
        """Return once the server answers; raises EngineLostError if it dies first or takes too long."""
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
        """Whether the server is alive and healthy now."""
        if self.process is not None and not self.process.is_alive:
            return False
        try:
            self._send("GET", "/health", None, timeout_seconds=_HEALTH_SECONDS)
        except EngineLostError:
            return False
        return True

    def open_paths(self) -> list[str]:
        """Paths that the server answers without its key."""
        found = self._send("GET", "/openapi.json", None, allow_missing=True)
        paths = dict.fromkeys((*_PATHS, *([] if found is None else found["paths"])))
        with self._connected({}) as stranger:
            return [path for path in paths if self._response(stranger, "GET", path).status_code not in _REFUSALS]

    def check_model(self, max_tokens: int) -> None:
        """Raise ValueError unless it serves the policy with a context of `max_tokens` tokens."""
        models = self._send("GET", "/v1/models", None)["data"]
        fitting = [model for model in models if model["id"] == MODEL_NAME and model["max_model_len"] >= max_tokens]
        if not fitting:
            served = ", ".join(f"{model['id']} (max_model_len {model['max_model_len']})" for model in models)
            raise ValueError(
                f"rollout.vllm.server.addresses: {self.address} serves {served}; it must serve the policy as"
                f" `--served-model-name {MODEL_NAME}` with --max-model-len of at least {max_tokens}"
            )

    def complete(
        self, prompt: Sequence[int], settings: Mapping[str, Any], *, n: int, seed: int
    ) -> list[ServerCompletion]:
        """`n` completions of one prompt, in the order of the seeds that the server derives from `seed`.

        Raises:
            EngineLostError: also if the server aborted one, which it reports with status 200.
        """
        body = {"model": MODEL_NAME, "prompt": list(prompt), "n": n, "seed": seed, "return_token_ids": True}
        answer = self._send("POST", "/v1/completions", body | dict(settings))
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        ended = [choice["finish_reason"] for choice in choices]
        if len(choices) != n or any(reason not in ("stop", "length") for reason in ended):
            raise EngineLostError(f"{self.address} gave {len(choices)} of {n} completions, which ended with {ended}")
        return [
            ServerCompletion(
                tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), choice["finish_reason"]
            )
            for choice in choices
        ]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """`T - 1` log-probs of all tokens but the first, at temperature 1."""
        body = {"model": MODEL_NAME, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0}
        (choice,) = self._send("POST", "/v1/completions", body | {"prompt_logprobs": 0})["choices"]
        rows = choice["prompt_logprobs"][1:]
        return [float(row[str(token)]["logprob"]) for row, token in zip(rows, token_ids[1:], strict=True)]

    def load_folder(self, folder: Path, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder that the server can read; sampling pauses meanwhile."""
        self.pause()
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
        self.resume(version)

    def pause(self) -> None:
        """Let running requests end, and begin no others."""
        self.post("/pause?mode=wait", None)

    def resume(self, version: int) -> None:
        """Drop the prefix cache of the old weights, record the version of the new ones, and resume sampling."""
        self.post("/reset_prefix_cache", None)
        self.post("/update_weight_version", {"new_version": str(version)})
        self.post("/resume", None)

    def post(self, path: str, body: Any, *, timeout_seconds: float | None = None) -> None:  # noqa: ANN401
        """Send a request whose answer has no content. Raises as `complete`, and ValueError if it is refused."""
        self._send("POST", path, body, timeout_seconds=timeout_seconds)

    def num_workers(self) -> int:
        """Number of workers that hold the server's weights together."""
        return int(self._send("GET", "/get_world_size", None)["world_size"])

    def leave_transfer(self) -> bool:
        """End a broken weight transfer on the server's side; False: the server cannot, and must restart."""
        seconds = min(self._timeout_seconds, _LEAVE_SECONDS)
        # A server in the middle of an update refuses to shut the transfer down. An empty update fails, which ends it.
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
        """This machine's address on its route to the server, at which the server can reach it."""
        if self.address.startswith(_UNIX):
            return _LOCALHOST
        url = urlsplit(self.address)
        port = url.port or _PORTS[url.scheme]
        try:
            with socket.create_connection((url.hostname, port), _CONNECT_SECONDS) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            raise EngineLostError(f"{self.address}: {type(error).__name__}") from None

    def checksums_held(self, names: Sequence[str]) -> list[dict[str, str]]:
        """For each worker, `WeightInspector.checksums_held`; only a server started with that extension has it."""
        rpc = {"method": "checksums_held", "args": [list(names)]}
        return list(self._send("POST", "/collective_rpc", rpc)["results"])

    def weight_version(self) -> str:
        """The version that the last sync recorded."""
        return str(self._send("GET", "/weight_info", None)["weight_version"])

    def close(self) -> None:
        """Close the connections, and end the server if it is this job's."""
        self._client.close()
        if self.process is not None:
            self.process.stop()

    def _connected(self, headers: Mapping[str, str]) -> httpx2.Client:
        """Connections to the server. They are the job's or the user's: no proxy of the environment stands between."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        path = self.address.removeprefix(_UNIX)
        if path == self.address:
            return httpx2.Client(base_url=self.address, headers=headers, limits=limits, trust_env=False)
        transport = httpx2.HTTPTransport(uds=path, limits=limits, trust_env=False)
        return httpx2.Client(base_url="http://vllm", headers=headers, transport=transport, trust_env=False)

    def _send(
        self,
        method: str,
        path: str,
        body: Any,  # noqa: ANN401
        *,
        timeout_seconds: float | None = None,
        allow_missing: bool = False,
    ) -> Any:  # noqa: ANN401
        """Send a request and return the answer's JSON; `allow_missing`: None where the server has no such path."""
        response = self._response(self._client, method, path, body, timeout_seconds)
        status = response.status_code
        if status >= 500:
            raise EngineLostError(f"{self.address}{path}: status {status}: {self._shown(response.text)}")
        if status == 404 and allow_missing:
            return None
        if status >= 400:
            raise ValueError(
                f"rollout.vllm.server: {self.address}{path} refuses (status {status}): {self._shown(response.text)}."
                " A server at an address must run with VLLM_SERVER_DEV_MODE=1, and api_key_file hold its key if it has"
                " one"
            )
        return response.json() if response.content else None

    def _response(
        self,
        client: httpx2.Client,
        method: str,
        path: str,
        body: Any = None,  # noqa: ANN401
        timeout_seconds: float | None = None,
    ) -> httpx2.Response:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None)
        try:
            return client.request(method, path, json=body, timeout=timeout)
        except httpx2.RequestError as error:
            # The library's text may hold headers or the address as it was given.
            raise EngineLostError(f"{self.address}{path}: {type(error).__name__}") from None

    def _shown(self, answer: str) -> str:
        """The beginning of a server's answer as one line, without the key."""
        text = answer if self._api_key is None else answer.replace(self._api_key, "***")
        return "".join(one if one.isprintable() else " " for one in text)[:500]
