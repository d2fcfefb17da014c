"""vLLM servers that die, hang or are wrong, each for real: the step is completed with every completion once, or the job
ends with one line; and nothing is left running."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.config.sections import LayoutConfig
from megatron_rlt.rollout.vllm import start_server as server_start
from megatron_rlt.rollout.vllm.client import EngineLostError, VllmServer
from megatron_rlt.rollout.vllm.settings import EngineShape
from megatron_rlt.rollout.vllm.start_server import start_server
from megatron_rlt.rollout.vllm.transfer.direct import BroadcastTransport
from megatron_rlt.types import Completion, StoppedError
from tests.ranks import run_ranks
from tests.vllm.policies import (
    Beside,
    Case,
    assert_nothing_runs,
    build,
    first_server,
    make_requests,
    save_policy,
    server_processes,
    train_a_little,
)

CASE = Case("one rank", LayoutConfig(), "qwen2", tied=False, tp=1)
REQUEST_SECONDS = 10.0
SERVER = VllmServerConfig(request_timeout_seconds=REQUEST_SECONDS, max_retries=1)
# A receiver that dies is noticed at once; the time-out only has to outlast a crowded machine.
BROADCAST = SERVER.model_copy(update={"transport": "broadcast", "bucket_bytes": 2**16, "request_timeout_seconds": 60.0})
Fault = Callable[[Beside], None]


def _during(beside: Beside, method: str, act: Callable[[], None]) -> None:
    """Act a moment after the server is next asked for something."""
    server = first_server(beside)
    asked = getattr(server, method)

    def ask(*args: Any, **kwargs: Any) -> Any:
        setattr(server, method, asked)
        threading.Timer(0.05, act).start()
        return asked(*args, **kwargs)

    setattr(server, method, ask)


def killed_before(beside: Beside) -> None:
    server_processes(beside)["api"].send_signal(signal.SIGKILL)


def core_killed_during(beside: Beside) -> None:
    _during(beside, "complete", lambda: server_processes(beside)["core"].send_signal(signal.SIGKILL))


def hangs(beside: Beside) -> None:
    _during(beside, "complete", lambda: server_processes(beside)["core"].send_signal(signal.SIGSTOP))


def sync_killed_half_way(beside: Beside) -> None:
    train_a_little(beside.model)
    _during(beside, "load_folder", lambda: server_processes(beside)["core"].send_signal(signal.SIGKILL))


def broadcast_killed_half_way(beside: Beside) -> None:
    """After a good part of the tensors has gone out, the receiver dies."""
    train_a_little(beside.model)
    assert beside.served is not None
    transport = beside.served._transport
    assert isinstance(transport, BroadcastTransport)
    check, core, seen = transport._check, server_processes(beside)["core"], []

    def check_and_kill() -> None:
        seen.append(1)
        if len(seen) == 8:
            core.send_signal(signal.SIGKILL)
        check()

    transport._source._check = check_and_kill


def live_through_faults(
    folder: Path, run: Path, faults: list[Fault], server: VllmServerConfig = SERVER
) -> list[tuple[list[Completion], dict[str, Any]]]:
    """One policy and its server, a step after every fault; what each step gave, the first one undisturbed."""
    beside = build(folder, CASE, server, run)
    requests = make_requests()
    found = [(beside.engine.generate(requests, policy_version=0), beside.engine.take_metrics())]
    for fault in faults:
        fault(beside)
        version = int(fault in SYNC_FAULTS)
        found.append((beside.engine.generate(requests, policy_version=version), beside.engine.take_metrics()))
    if faults[-1] in SYNC_FAULTS:
        found.append((beside.engine.generate(requests, policy_version=1), beside.engine.take_metrics()))
    return found


SYNC_FAULTS = (sync_killed_half_way, broadcast_killed_half_way)


@pytest.mark.parametrize("faults", [[killed_before, core_killed_during], [hangs]], ids=["killed", "hangs"])
def test_a_lost_server_is_started_again_and_no_completion_is_lost_or_counted_twice(
    faults: list[Fault], tmp_path: Path
) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    ((undisturbed, *disturbed),) = run_ranks(live_through_faults, 1, folder, tmp_path / "run", faults)
    assert undisturbed[1]["engine_restarts"] == 0.0
    for completions, metrics in disturbed:
        assert metrics["engine_restarts"] == 1.0
        assert metrics["weight_sync_probe_gap"] < 1e-4, "a server that starts again has the policy's weights again"
        assert _ids(completions) == _ids(undisturbed[0])
    assert_nothing_runs(tmp_path)


@pytest.mark.parametrize(
    ("server", "fault"),
    [(SERVER, sync_killed_half_way), (BROADCAST, broadcast_killed_half_way)],
    ids=["files", "broadcast"],
)
def test_a_sync_that_fails_half_way_is_made_again_before_anything_is_sampled(
    server: VllmServerConfig, fault: Fault, tmp_path: Path
) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    (found,) = run_ranks(live_through_faults, 1, folder, tmp_path / "run", [fault], server)
    (before, _), (disturbed, metrics), (undisturbed, _) = found
    assert metrics["engine_restarts"] == 1.0
    assert metrics["weight_sync_probe_gap"] < 1e-4
    assert _ids(disturbed) == _ids(undisturbed) != _ids(before)
    assert_nothing_runs(tmp_path)


def _ids(completions: list[Completion]) -> list[list[int]]:
    return [one.token_ids.tolist() for one in completions]


def lose_it_too_often(folder: Path, run: Path) -> str:
    """A server whose engine core is killed whenever it is asked."""
    beside = build(folder, CASE, SERVER, run)
    _during(beside, "complete", lambda: server_processes(beside)["core"].send_signal(signal.SIGKILL))
    assert beside.served is not None
    restart = beside.served.restart

    def restart_and_lose_again() -> None:
        restart()
        server_processes(beside)["api"].send_signal(signal.SIGKILL)
        time.sleep(1.0)

    beside.served.restart = restart_and_lose_again  # type: ignore[method-assign]
    start = time.monotonic()
    try:
        beside.engine.generate(make_requests(), policy_version=0)
    except StoppedError as error:
        assert time.monotonic() - start < 120.0
        return str(error)
    return "it went on"


def test_a_server_that_is_lost_again_and_again_ends_the_job_with_one_line(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    (line,) = run_ranks(lose_it_too_often, 1, folder, tmp_path / "run")
    assert line.startswith("the sampling engine is lost, and no update was made: http://127.0.0.1:")
    assert "\n" not in line
    assert_nothing_runs(tmp_path)


def _start(folder: Path, log: Path, settings: VllmConfig) -> VllmServer:
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, settings, on_gpu=False)
    return start_server(
        shape, log_file=log, devices="", start_timeout_seconds=120.0, request_timeout_seconds=REQUEST_SECONDS
    )


def test_a_start_without_memory_says_so_and_where_the_log_is(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    log = tmp_path / "server.log"
    with pytest.raises(EngineLostError) as raised:
        _start(folder, log, VllmConfig(kv_cache_bytes=2**50))
    assert "ended while it started" in str(raised.value)
    assert "memory" in str(raised.value).lower()
    assert str(log) in str(raised.value)
    assert_nothing_runs(folder)


def test_a_port_that_somebody_took_meanwhile_is_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    folder = save_policy(tmp_path / "policy", CASE)
    free = server_start.free_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(server_start, "free_port", lambda: next(ports, None) or free())
        server = _start(folder, tmp_path / "server.log", VllmConfig(kv_cache_bytes=2**25))
        try:
            assert server.answers()
            assert not server.address.endswith(f":{taken.getsockname()[1]}")
        finally:
            server.close()
    assert_nothing_runs(folder)


def ask_a_servers_address(folder: Path, other: Path, run: Path) -> dict[str, str]:
    """Servers at addresses: one that serves the policy, one of another model, one that is not there."""
    told: dict[str, str] = {}
    server = _start(folder, run / "given.log", VllmConfig(kv_cache_bytes=2**25))
    given = VllmServerConfig(addresses=(server.address,), request_timeout_seconds=REQUEST_SECONDS)
    told["address"] = server.address
    beside = build(folder, CASE, given, run)
    told["right"] = str(len(beside.engine.generate(make_requests(), policy_version=0)))
    try:
        build(other, CASE, given, run).engine.generate(make_requests(), policy_version=0)
    except StoppedError as error:
        told["other model"] = str(error)
    try:
        other_way = given.model_copy(update={"transport": "broadcast"})
        build(folder, CASE, other_way, run).engine.generate(make_requests(), policy_version=0)
    except ValueError as error:
        told["other transport"] = str(error)
    os.kill(_processes_of(server).pid, signal.SIGKILL)
    time.sleep(1.0)
    try:
        build(folder, CASE, given, run)
    except EngineLostError as error:
        told["gone"] = str(error)
    server.close()
    return told


def _processes_of(server: VllmServer) -> psutil.Process:
    assert server.process is not None
    (api,) = psutil.Process(server.process._guard.pid).children()
    return api


def test_a_server_at_an_address_is_used_but_never_started_or_ended(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", CASE)
    other = save_policy(tmp_path / "other", Case("other", LayoutConfig(), "qwen3", tied=False, tp=1))
    (tmp_path / "run").mkdir()
    (told,) = run_ranks(ask_a_servers_address, 1, folder, other, tmp_path / "run")
    assert told["right"] == str(len(make_requests()))
    assert told["address"] in told["other model"]
    assert 'must run with --weight-transfer-config \'{"backend":"gloo"}\'' in told["other transport"]
    assert told["gone"].startswith(told["address"])
    assert_nothing_runs(tmp_path)
