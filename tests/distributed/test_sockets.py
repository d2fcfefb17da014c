"""Where a running command can be reached: nowhere with one rank, over loopback alone with two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.commands import Command
from tests.distributed.tiny_runs import SCORER_CONFIG, SMALL_SFT, TinyInputs, tiny_inputs

_STEPS = [*SMALL_SFT, "num_steps=2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"), num_rows=8)


def test_one_rank_opens_no_port(inputs: TinyInputs, tmp_path: Path) -> None:
    command = Command("sft", SCORER_CONFIG, [*_STEPS, *inputs.for_sft, "world_size=1"], tmp_path / "run")
    assert command.listening() == set()
    ended = command.finish()
    assert ended.status == 0, ended.errors


def test_two_ranks_listen_on_loopback_alone(inputs: TinyInputs, tmp_path: Path) -> None:
    command = Command("sft", SCORER_CONFIG, [*_STEPS, *inputs.for_sft], tmp_path / "run")
    found = command.listening()
    assert {one.protocol for one in found} == {"tcp"}, "gloo listens"
    assert [one for one in found if not one.is_loopback] == []
    ended = command.finish()
    assert ended.status == 0, ended.errors
