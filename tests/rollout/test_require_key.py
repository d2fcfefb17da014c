"""vLLM's middleware hook with this project's class: every path of an application demands the key."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from megatron_rlt.rollout.vllm.require_key import RequireKey

KEY = "s3cr3t-key"


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "reached"})


def _ask(path: str, authorization: list[str], *, kind: str = "http", method: str = "GET") -> list[Any]:
    sent: list[Any] = []
    headers = [(b"authorization", value.encode()) for value in authorization]

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nothing is read of a request that is refused")

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("status", message["type"]))

    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(RequireKey(_application)(scope, receive, send))
    return sent


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.mark.parametrize("path", ["/", "/health", "/collective_rpc", "/v1/models", "/v1/../weight_info"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_every_path_and_method_demands_the_key(path: str, method: str) -> None:
    refused = [401, "http.response.body"]
    assert _ask(path, [], method=method) == refused
    for wrong in ("", KEY, "Bearer", f"Bearer {KEY} ", f"Bearer {KEY[:-1]}", f"Basic {KEY}"):
        assert _ask(path, [wrong], method=method) == refused, wrong
    assert _ask(path, [f"Bearer {KEY}", "Bearer other"], method=method) == refused
    assert _ask(path, [f"Bearer {KEY}"], method=method) == ["reached"]


def test_a_websocket_without_the_key_is_closed_and_the_servers_own_start_is_let_through() -> None:
    assert _ask("/v1/realtime", [], kind="websocket") == ["websocket.close"]
    assert _ask("", [], kind="lifespan") == ["reached"]


def test_a_server_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(ValueError, match="VLLM_API_KEY"):
        RequireKey(_application)
