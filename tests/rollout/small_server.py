"""The tests' one fake: a small server with the paths and rules of vLLM's, whose sampling is arithmetic.

A real one takes half a minute to start; `tests/vllm` runs those. This one is spoken to over real HTTP, and a test
asserts what comes of it: completions, and the weights, version and ranks that the server has in the end.
"""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

MODEL, MAX_TOKENS = "policy", 128

Answer = tuple[int, Any]  # status and JSON


class SmallServer:
    """Its weights are one number; a completion is that number and the seed of its index."""

    def __init__(self, *, api_key: str | None = None, guarded: str = "/", num_workers: int = 1) -> None:
        """`guarded`: beginning of the paths that demand the key; vLLM's own guards `/v1` alone."""
        self.weights, self.version = 100, "none"
        self.faults: dict[str, Answer | Callable[[Any], Answer | None]] = {}  # by path; a function may let it pass
        self.delay_seconds = 0.0
        self.ranks: range | None = None  # of its workers, in a weight transfer
        self.received: list[dict[str, Any]] = []  # what it was told of tensors
        self.models = {MODEL: MAX_TOKENS}
        self._api_key, self._guarded, self._num_workers = api_key, guarded, num_workers
        self._is_paused = False
        self._cached: dict[tuple[int, ...], int] = {}  # prompt -> weights that prefilled it
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: Any, authorization: str | None) -> Answer:
        time.sleep(self.delay_seconds)
        fault = self.faults.get(path)
        found = fault(body) if callable(fault) else fault
        if found is not None:
            return found
        is_guarded = self._api_key is not None and path.startswith(self._guarded)
        if is_guarded and authorization != f"Bearer {self._api_key}":
            return 401, {"error": "Unauthorized"}
        method = getattr(self, f"_{path.strip('/').split('?')[0].replace('/', '_')}", None)
        return (404, {"detail": "Not Found"}) if method is None else method(body)

    def _health(self, _: Any) -> Answer:
        return 200, None

    def _v1_models(self, _: Any) -> Answer:
        return 200, {"data": [{"id": name, "max_model_len": length} for name, length in self.models.items()]}

    def _v1_completions(self, body: Any) -> Answer:
        if self._is_paused or body["model"] not in self.models or not body["return_token_ids"]:
            return 400, {"error": "paused, or asked for something else"}
        weights = self._cached.setdefault(tuple(body["prompt"]), self.weights)
        choices = [choice(i, [weights, body["seed"] + i], body.get("temperature", 1.0)) for i in range(body["n"])]
        return 200, {"choices": choices[::-1]}

    def _pause(self, _: Any) -> Answer:
        self._is_paused = True
        return 200, None

    def _resume(self, _: Any) -> Answer:
        self._is_paused = False
        return 200, None

    def _collective_rpc(self, body: Any) -> Answer:
        if not self._is_paused:
            return 500, {"error": "weights that are being used were replaced"}
        assert body["method"] == "reload_weights"
        (file,) = Path(body["kwargs"]["weights_path"]).glob("*.safetensors")
        self.weights = int(load_file(file)["weight"])
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, _: Any) -> Answer:
        self._cached = {}
        return 200, None

    def _update_weight_version(self, body: Any) -> Answer:
        self.version = body["new_version"]
        return 200, None

    def _weight_info(self, _: Any) -> Answer:
        return 200, {"weight_version": self.version}

    def _get_world_size(self, _: Any) -> Answer:
        return 200, {"world_size": self._num_workers}

    def _init_weight_transfer_engine(self, body: Any) -> Answer:
        first = body["init_info"]["rank_offset"]
        self.ranks = range(first, first + self._num_workers)
        return 200, None

    def _start_weight_update(self, _: Any) -> Answer:
        return 200, None

    def _update_weights(self, body: Any) -> Answer:
        info = dict(body["update_info"])
        if "ipc_handles_pickled" in info:
            info["ipc_handles"] = pickle.loads(base64.b64decode(info.pop("ipc_handles_pickled")))
        self.received.append(info)
        return 200, None


def choice(index: int, ids: list[int], temperature: float = 1.0, finish_reason: str | None = "length") -> Any:
    """As vLLM has it; the log-prob of a token is minus its id at temperature 1."""
    logprobs = {"token_logprobs": [-token / temperature for token in ids]}
    return {"index": index, "token_ids": ids, "logprobs": logprobs, "finish_reason": finish_reason}


def _handler(server: SmallServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(json.loads(body) if body else None)

        def _answer(self, body: Any) -> None:
            status, answer = server.answer(self.path, body, self.headers.get("Authorization"))
            sent = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    return Handler
