"""A rollout that was interrupted keeps what was answered, and sends the rest again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.config.rollout import VllmConfig, VllmServerConfig
from megatron_rlt.rollout.requests import SampleRequest
from megatron_rlt.rollout.vllm.client import EngineLostError
from megatron_rlt.rollout.vllm.servers import VllmServers
from megatron_rlt.rollout.vllm.settings import EngineShape, Sampling
from megatron_rlt.rollout.vllm.transfer.direct import weight_transport
from megatron_rlt.types import tell_nobody
from tests.ranks import run_ranks
from tests.rollout.small_server import SmallServer


class Never:
    """Ends no completion."""

    stop_ids = ()
    end_tag = None

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        return False


def _servers(server: SmallServer, folder: Path) -> VllmServers:
    config = VllmServerConfig(addresses=(server.address,), allow_unprotected=True, max_retries=0)
    return _connected(config, folder)


def _connected(config: VllmServerConfig, folder: Path) -> VllmServers:
    shape = EngineShape(folder, "float32", 1, 128, 16, 64, VllmConfig(server=config), on_gpu=False)
    sampling = Sampling(1.0, 1.0, 131, 131, 8, Never())
    return VllmServers(shape, sampling, weight_transport(shape, folder, tell_nobody), log_folder=folder)


def interrupt(folder: Path, version_after: int) -> list[tuple[int, int, list[int]]]:
    """The second request fails once, and the policy may have changed until it is sent again.

    Returns:
        Seed, version and ids of all completions.
    """
    (folder / "config.json").write_text("{}")
    server, failures = SmallServer(), iter([True])
    server.faults["/v1/completions"] = lambda body: (
        (500, None) if body["prompt"] == [2] and next(failures, None) else None
    )
    servers = _servers(server, folder)
    requests = [SampleRequest(torch.tensor([prompt]), 10 * prompt + member) for prompt in (1, 2) for member in (0, 1)]

    def load(version: int) -> None:
        servers.load_weights([("weight", torch.tensor([100.0 + version]))], version)

    load(0)
    servers.start(requests, 0, [range(4)])
    with pytest.raises(EngineLostError):
        servers.arrivals()
    load(version_after)
    servers.send_again(version_after)
    (arrival,) = servers.arrivals()
    server.close()
    return [(one.seed, one.policy_version, one.token_ids.tolist()) for one in arrival.completions]


@pytest.mark.parametrize("version", [0, 1])
def test_only_what_was_not_answered_is_sampled_again_and_says_by_which_weights(version: int, tmp_path: Path) -> None:
    ((*first, second, third),) = run_ranks(interrupt, 1, tmp_path, version)
    assert first == [(10, 0, [100, 10]), (11, 0, [100, 11])]
    assert [second, third] == [(20, version, [100 + version, 20]), (21, version, [100 + version, 21])]


def sample_a_prompt_twice(folder: Path) -> list[tuple[int, list[int]]]:
    """One prompt in two parts of a batch; part and seeds of what arrives."""
    server = SmallServer()
    servers = _servers(server, folder)
    requests = [SampleRequest(torch.tensor([5, 6]), seed) for seed in range(6)]
    server.version = "0"
    servers.start(requests, 0, [range(2), range(2, 6)])
    come: list[tuple[int, list[int]]] = []
    while arrivals := servers.arrivals():
        come += [(one.part, [completion.seed for completion in one.completions]) for one in arrivals]
    server.close()
    return sorted(come)


def test_a_prompt_that_a_batch_has_twice_belongs_to_both_of_its_parts(tmp_path: Path) -> None:
    assert run_ranks(sample_a_prompt_twice, 1, tmp_path) == [[(0, [0, 1]), (1, [2, 3, 4, 5])]]


def connect(folder: Path, guarded: str, settings: dict[str, Any]) -> str:
    """What connecting to a server with a key raises."""
    (folder / "key").write_text("secret\n")
    server = SmallServer(api_key="secret", guarded=guarded)
    config = VllmServerConfig(addresses=(server.address,), api_key_file=folder / "key", **settings)
    try:
        _connected(config, folder)
    except ValueError as error:
        return str(error).replace(server.address, "ADDRESS")
    finally:
        server.close()
    return "connected"


def test_a_server_with_open_paths_is_refused_unless_the_user_allows_it(tmp_path: Path) -> None:
    (refused,) = run_ranks(connect, 1, tmp_path, "/v1", {})
    assert refused.startswith("rollout.vllm.server.addresses: ADDRESS answers 6 paths without the key, such as")
    assert "--middleware megatron_rlt.rollout.vllm.require_key.RequireKey" in refused
    assert run_ranks(connect, 1, tmp_path, "/v1", {"allow_unprotected": True}) == ["connected"]
    assert run_ranks(connect, 1, tmp_path, "/", {}) == ["connected"]
