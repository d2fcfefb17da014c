"""Middleware for a vLLM server at an address: every path demands the key. vLLM's own key guards `/v1` and few others.

Used as `VLLM_API_KEY=... vllm serve ... --middleware megatron_rlt.rollout.vllm.require_key.RequireKey`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_rlt.parallel.environment import vllm_api_key

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
WORD = f"{__name__}.RequireKey"
"""The middleware's name on vLLM's command line."""
_REFUSAL = b'{"error":"Unauthorized"}'


class RequireKey:
    """ASGI application that answers 401 to whatever comes without `Authorization: Bearer KEY`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        """Raises ValueError if VLLM_API_KEY holds no key."""
        key = vllm_api_key()
        if not key:
            raise ValueError("RequireKey needs a key in the environment variable VLLM_API_KEY")
        self._app, self._expected = app, _digest(b"Bearer " + key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request with the key, or the server's own start and end, to the application; refuse all others."""
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(_digest(given[0]), self._expected)


def _digest(text: bytes) -> bytes:
    """Of equal length for all texts, so that the comparison tells nothing of the key."""
    return hashlib.sha256(text).digest()
