"""Several servers are driven through a weight transfer as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.transfer.client import TransferClient
from tests.rollout.small_server import SmallServer
from tests.rollout.test_vllm_client import client


@pytest.fixture
def servers() -> Iterator[list[SmallServer]]:
    servers = [SmallServer(num_workers=2), SmallServer(num_workers=3)]
    yield servers
    for server in servers:
        server.close()


def both_of(servers: list[SmallServer]) -> TransferClient:
    return TransferClient([client(server.address) for server in servers])


def test_the_workers_of_a_server_follow_those_of_the_one_before(servers: list[SmallServer]) -> None:
    both = both_of(servers)
    assert both.num_workers == 5
    both.init_weight_transfer_engine({"rank_offset": 1})
    assert [server.ranks for server in servers] == [range(1, 3), range(3, 6)]
    both.check()


def test_the_first_failure_is_kept_and_no_server_gets_anything_after_it(servers: list[SmallServer]) -> None:
    both, told = both_of(servers), []
    both.on_failure = lambda: told.append(1)
    both.update_weights({"names": ["first"]})
    servers[1].faults["/start_weight_update"] = (500, {"error": "EngineCore"})
    both.start_weight_update()
    both.update_weights({"names": ["second"]})
    assert told == [1]
    assert [server.received for server in servers] == [[{"names": ["first"]}]] * 2
    with pytest.raises(EngineLostError, match="status 500"):
        both.check()


def test_handles_of_memory_travel_pickled(servers: list[SmallServer]) -> None:
    handles = {"GPU-1": (b"handle", 7)}
    both_of(servers).update_weights({"names": ["a"], "ipc_handles": handles, "ipc_handles_pickled": None})
    assert servers[1].received == [{"names": ["a"], "ipc_handles": handles}]
