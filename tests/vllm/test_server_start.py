"""Servers that do not start, start elsewhere than they were told, or run already at an address."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.rollout.vllm import start_server as server_start
from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import start_server
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


def start_on_a_taken_port(folder: Path, log: Path) -> tuple[ServerClient, str]:
    """A server that was told a port which somebody took meanwhile, and that port."""
    free = server_start.free_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        server_start.free_port = lambda: next(ports, None) or free()
        return start(folder, log), str(taken.getsockname()[1])


def use_an_address(folder: Path, other: Path, run: Path) -> dict[str, str]:
    """A server at an address, asked by jobs of its own model, of another, with another transport, and when it is
    gone."""
    server, taken = start_on_a_taken_port(folder, run / "given.log")
    told = {"taken": taken, "address": server.address}
    given = SERVER.model_copy(update={"addresses": (server.address,)})
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


def test_a_port_that_somebody_took_meanwhile_is_replaced_by_another(told: dict[str, str]) -> None:
    assert not told["address"].endswith(f":{told['taken']}")


def test_a_server_at_an_address_is_used_but_never_started_or_ended(told: dict[str, str], folder: Path) -> None:
    assert told["right"] == str(len(make_requests()))
    assert told["address"] in told["other model"]
    assert told["gone"].startswith(told["address"])
    assert_nothing_runs(folder)


def test_a_server_that_was_not_started_for_a_transport_is_refused_with_what_it_needs(told: dict[str, str]) -> None:
    assert 'must run with --weight-transfer-config \'{"backend":"nccl"}\'' in told["other transport"]
