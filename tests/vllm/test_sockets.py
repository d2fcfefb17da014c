"""Where a job with vLLM can be reached: over loopback and Unix sockets of its user alone, in both placements."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlt.parallel.environment import free_port
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, tiny_inputs
from tests.ranks import run_ranks
from tests.vllm.policies import assert_nothing_runs
from tests.vllm.test_train import COLOCATED, SERVER, SETTINGS
from tools.chaos.sockets import ListeningSocket, listening_sockets
from tools.demo.make_assets import NUM_VLLM_HEADS


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("placement", [COLOCATED, [*SERVER, "rollout.vllm.tp=2"]], ids=["colocated", "server"])
def test_a_job_with_vllm_listens_on_loopback_and_unix_sockets_alone(placement: list[str], tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path / "inputs", num_rows=8, num_heads=NUM_VLLM_HEADS)
    settings = [*SETTINGS, "num_steps=1", "grpo.questions_per_step=2", *placement, *inputs.for_train]
    command = Command("train", RL_CONFIG, settings, tmp_path / "run")
    found = command.listening()
    assert found, "gloo listens"
    assert [one for one in found if not one.is_loopback] == []
    ended = command.finish()
    assert ended.status == 0, ended.errors
    assert_nothing_runs(tmp_path)


def _open_a_broadcasts_store(address: str) -> list[ListeningSocket]:
    before = set(listening_sockets())
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(address, free_port(address), rank=0, world_size=1)
    found = [one for one in listening_sockets() if one not in before]
    assert group.store is not None
    return found


def test_the_store_of_a_broadcast_listens_on_the_address_in_use_alone() -> None:
    address = "127.0.0.2"  # no address that anything would choose by itself
    ((found,),) = run_ranks(_open_a_broadcasts_store, 1, address)
    assert (found.protocol, found.address) == ("tcp", address)
