"""How a trainer finds the servers of its job's own Slurm step: once they answer, again after a loss, or never."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.parallel.environment import ServerStep
from megatron_rlt.rollout.vllm import server_sources
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.server_sources import StepServers
from megatron_rlt.rollout.vllm.server_step import StepFolder, StepServer
from megatron_rlt.rollout.vllm.settings import EngineShape
from tests.rollout.small_server import SmallServer

KEY = "secret"


def _source(folder: Path, *, num_nodes: int = 1, start_timeout_seconds: float = 60.0) -> StepServers:
    (folder / "key").write_text(KEY)
    config = VllmServerConfig(start_timeout_seconds=start_timeout_seconds)
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, VllmConfig(server=config), on_gpu=False)
    return StepServers(shape, ServerStep(folder, num_nodes))


def _soon(act: Callable[[], None]) -> None:
    threading.Timer(0.2, act).start()


def test_it_waits_until_all_servers_of_all_nodes_answer(tmp_path: Path) -> None:
    servers, step = [SmallServer(api_key=KEY) for _ in range(3)], StepFolder(tmp_path)
    first, second, third = (one.address for one in servers)
    step.announce(0, [StepServer(0, 0, 1, first), StepServer(0, 1, 1, None)])

    def last_ones() -> None:
        step.announce(1, [StepServer(1, 0, 1, third)])
        step.announce(0, [StepServer(0, 0, 1, first), StepServer(0, 1, 1, second)])

    _soon(last_ones)
    found = _source(tmp_path, num_nodes=2).connect()
    assert [one.address for one in found] == [first, second, third]
    assert found[2].weight_version() == "none", "the key is the step's"
    for one in servers:
        one.close()


def test_a_lost_server_is_given_up_and_another_start_takes_its_place(tmp_path: Path) -> None:
    old, new, step = SmallServer(api_key=KEY), SmallServer(api_key=KEY), StepFolder(tmp_path)
    known = StepServer(0, 0, 1, old.address)
    step.announce(0, [known])
    source = _source(tmp_path)
    (client,) = source.connect()
    assert not step.is_given_up(known)

    def keeper() -> None:
        assert step.is_given_up(known)
        step.announce(0, [replace(known, start=2, address=new.address)])

    _soon(keeper)
    assert source.replace(0, client).address == new.address
    # The same address again, of a third start: what tells starts apart is their number.
    _soon(lambda: step.announce(0, [replace(known, start=3, address=new.address)]))
    assert source.replace(0, client).address == new.address
    assert step.is_given_up(replace(known, start=2))
    for one in (old, new):
        one.close()


def test_a_step_that_cannot_go_on_says_why_to_whoever_waits(tmp_path: Path) -> None:
    step = StepFolder(tmp_path)
    _soon(lambda: step.fail("no memory on node7"))
    with pytest.raises(EngineLostError, match="no memory on node7"):
        _source(tmp_path).connect()
    step.fail("a later reason")
    assert step.failure() == "no memory on node7"


def test_a_step_that_says_nothing_is_waited_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sources, "_LATE_SECONDS", 0.0)
    with pytest.raises(EngineLostError, match="waited 1 s for a server of the job's own step"):
        _source(tmp_path, start_timeout_seconds=1.0).connect()


def test_a_server_of_the_step_with_open_paths_is_refused(tmp_path: Path) -> None:
    server = SmallServer(api_key=KEY, guarded="/v1")
    StepFolder(tmp_path).announce(0, [StepServer(0, 0, 1, server.address)])
    with pytest.raises(ValueError, match="answers 6 paths without the key"):
        _source(tmp_path).connect()
    server.close()
