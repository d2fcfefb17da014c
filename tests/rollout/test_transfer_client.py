"""Several servers are asked as one; the servers are small ones of the test, the HTTP real."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator

import pytest

from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.transfer.client import TransferClient
from tests.rollout.test_vllm_server import FakeServer, client


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    servers = [FakeServer(), FakeServer()]
    for server, size in zip(servers, (2, 3), strict=True):
        server.answers["/get_world_size"] = (200, {"world_size": size})
        for path in ("init_weight_transfer_engine", "start_weight_update", "update_weights"):
            server.answers[f"/{path}"] = (200, None)
    yield servers
    for server in servers:
        server.close()


def ask_both(fakes: list[FakeServer]) -> TransferClient:
    return TransferClient([client(fake.address) for fake in fakes])


def test_the_workers_of_a_server_follow_those_of_the_one_before(fakes: list[FakeServer]) -> None:
    both = ask_both(fakes)
    assert both.num_workers == 5
    both.init_weight_transfer_engine({"rank_offset": 1})
    told = [fake.asked[-1][1]["init_info"]["rank_offset"] for fake in fakes]
    assert told == [1, 3]
    both.check()


def test_the_first_failure_is_kept_and_nothing_is_asked_after_it(fakes: list[FakeServer]) -> None:
    both, told = ask_both(fakes), []
    both.on_failure = lambda: told.append(1)
    fakes[1].answers["/start_weight_update"] = (500, {"error": "EngineCore"})
    both.start_weight_update()
    both.update_weights({"names": []})
    assert told == [1]
    assert [path for path, _, _ in fakes[0].asked] == ["/get_world_size", "/start_weight_update"]
    with pytest.raises(EngineLostError, match="status 500"):
        both.check()


def test_handles_of_memory_travel_pickled(fakes: list[FakeServer]) -> None:
    handles = {"GPU-1": (b"handle", 7)}
    ask_both(fakes).update_weights({"names": ["a"], "ipc_handles": handles, "ipc_handles_pickled": None})
    info = fakes[1].asked[-1][1]["update_info"]
    assert info.keys() == {"names", "ipc_handles_pickled"}
    assert pickle.loads(base64.b64decode(info["ipc_handles_pickled"])) == handles
