"""Servers that do not start, or run already at an address."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx2
import pytest

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.parallel.environment import free_port
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.server_process import ServerProcess, private_folder
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import command, start_server
from megatron_rlt.types import StoppedError
from tests.ranks import run_ranks
from tests.vllm.policies import (
    TIMEOUT_SECONDS,
    Case,
    api_process,
    assert_nothing_runs,
    make_requests,
    save_policy,
    served,
)
from tests.vllm.server_plugin import use_plugin

CASE = Case("one rank", LayoutConfig(), "qwen2", tied=False, tp=1)
SERVER = VllmServerConfig(request_timeout_seconds=30.0)


def start(folder: Path, log: Path, *, cache_bytes: int = 2**25) -> ServerClient:
    use_plugin()
    settings = VllmConfig(kv_cache_bytes=cache_bytes, server=SERVER)
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, settings, on_gpu=False)
    return start_server(shape, log_file=log, devices="")


def start_without_memory(folder: Path, log: Path) -> str:
    try:
        start(folder, log, cache_bytes=2**50)
    except EngineLostError as error:
        return str(error)
    return "it started"


def test_a_start_without_memory_says_so_and_where_the_log_is(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    log = tmp_path / "server.log"
    (line,) = run_ranks(start_without_memory, 1, folder, log)
    assert "ended while it started" in line
    assert "memory" in line.lower()
    assert str(log) in line
    assert_nothing_runs(folder)


KEY = "a-key-of-this-test"
BEARER = {"Authorization": f"Bearer {KEY}"}
_REQUIRE_KEY = "megatron_rlt.rollout.vllm.require_key.RequireKey"


def start_at_an_address(folder: Path, log: Path) -> ServerClient:
    """A server at a port of this machine, as a user starts it: every path demands the key."""
    use_plugin()
    shape = EngineShape(
        folder, "float32", 1, 128, 16, 64, VllmConfig(kv_cache_bytes=2**25, server=SERVER), on_gpu=False
    )
    port = free_port()
    started = command(shape, {"host": "127.0.0.1", "port": port, "middleware": _REQUIRE_KEY})
    process = ServerProcess(
        ["env", f"VLLM_API_KEY={KEY}", *started], folder=private_folder(), log_file=log, devices="", unpickles=False
    )
    server = ServerClient(f"http://127.0.0.1:{port}", api_key=KEY, timeout_seconds=30.0, process=process)
    server.wait_until_ready(300.0)
    return server


def use_an_address(folder: Path, other: Path, run: Path) -> dict[str, str]:
    """A server at an address, asked by jobs of its own model, of another, with another transport, and when it is
    gone."""
    server = start_at_an_address(folder, run / "given.log")
    told = {"address": server.address, "open": " ".join(server.open_paths())}
    told["paths"] = " ".join(
        httpx2.get(f"{server.address}/openapi.json", headers=BEARER, trust_env=False).json()["paths"]
    )
    key_file = run / "key"
    key_file.write_text(f"{KEY}\n")
    given = SERVER.model_copy(update={"addresses": (server.address,), "api_key_file": key_file})
    told["right"] = str(len(served(folder, CASE, given, run).engine.generate(make_requests(), policy_version=0)))
    try:
        served(other, CASE, given, run).engine.generate(make_requests(), policy_version=0)
    except StoppedError as error:
        told["other model"] = str(error)
    try:
        by_broadcast = given.model_copy(update={"transport": "broadcast"})
        served(folder, CASE, by_broadcast, run).engine.generate(make_requests(), policy_version=0)
    except ValueError as error:
        told["other transport"] = str(error)
    api_process(server).send_signal(signal.SIGKILL)
    time.sleep(1.0)
    try:
        served(folder, CASE, given, run)
    except EngineLostError as error:
        told["gone"] = str(error)
    server.close()
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("address")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, str]:
    policy = save_policy(folder / "policy", CASE)
    other = save_policy(folder / "other", Case("other", LayoutConfig(), "qwen3", tied=False, tp=1))
    (found,) = run_ranks(use_an_address, 1, policy, other, folder / "run", timeout_seconds=TIMEOUT_SECONDS)
    return found


def test_with_the_middleware_no_path_that_vllm_names_is_open(told: dict[str, str]) -> None:
    assert told["open"] == ""
    named = told["paths"].split()
    assert {"/collective_rpc", "/update_weights", "/weight_info", "/v1/completions", "/health"} <= set(named)


def test_a_server_at_an_address_is_used_but_never_started_or_ended(told: dict[str, str], folder: Path) -> None:
    assert told["right"] == str(len(make_requests()))
    assert told["address"] in told["other model"]
    assert told["gone"].startswith(told["address"])
    assert_nothing_runs(folder)


def test_a_server_that_was_not_started_for_a_transport_is_refused_with_what_it_needs(told: dict[str, str]) -> None:
    assert 'must run with --weight-transfer-config \'{"backend":"nccl"}\'' in told["other transport"]
