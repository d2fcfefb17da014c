"""On one GPU: a checkpoint of Transformer Engine's optimizer, written while training goes on, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.checkpoint.background import BackgroundWrite
from megatron_rlt.checkpoint.folders import CheckpointInfo
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import CapturedState, capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import SharedState, load_training_state
from megatron_rlt.config.models import ModelConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig, Reshardable
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.jobs.sft import sft_update
from megatron_rlt.parallel.environment import Place, torch_environment
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.platform import group_of_a_thread, start_distributed, stop_distributed, world
from megatron_rlt.policy.policy import Policy
from megatron_rlt.types import Span, SpannedSequence
from tests.tiny_models import tiny_hf_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with torch_environment(Place(0, 1, 0, "this test")):
        start_distributed(timeout_seconds=120)
        yield build_layout(ModelConfig(model=Path("-")).layout)
        stop_distributed()


def _policy(folder: Path, layout: Layout) -> Policy:
    return Policy(
        load_model(ModelConfig(model=folder), layout),
        optimizer=OptimizerConfig(lr=1e-2),
        blocks=ScoringConfig(),
        temperature=1.0,
        max_tokens_per_pack=256,
        micro_batch_size=None,
        num_updates=10,
    )


def _update(policy: Policy, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    sft_update(policy, [SpannedSequence(torch.randint(0, 131, (24,), generator=generator), (Span(1, 24),))])


def _capture(policy: Policy, reshardable: Reshardable, *, copy: bool) -> CapturedState:
    return capture_training_state(
        policy.num_updates,
        models={"policy": policy.model},
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        rank_state=RankState.capture(extra=b""),
        shared_state=SharedState(b"{}", {}),
        num_updates=policy.num_updates,
        reshardable=reshardable,
        copy=copy,
    )


def _hashes(info: CheckpointInfo) -> dict[str, str]:
    return {name: one.sha256 for name, one in info.manifest.files.items() if not name.endswith(".metadata")}


def _weights(policy: Policy) -> list[Tensor]:
    return [weight.detach().clone() for weight in policy.model.parameters()]


@pytest.mark.parametrize("reshardable", ["full", "tp_pp"])
def test_the_background_saves_the_bits_of_its_step(tmp_path: Path, layout: Layout, reshardable: Reshardable) -> None:
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=False, hidden_size=128, head_dim=32)
    policy, group = _policy(folder, layout), group_of_a_thread(timeout_seconds=60)
    for number in range(2):
        _update(policy, number)
    saved = write_training_state(
        _capture(policy, reshardable, copy=False), tmp_path / "foreground", keep_last=1, group=world()
    )
    captured = _capture(policy, reshardable, copy=True)
    _update(policy, 2)
    write = BackgroundWrite(captured, tmp_path / "background", keep_last=1, group=group)
    _update(policy, 3)
    info, _ = write.result()
    assert _hashes(info) == _hashes(saved)
    again = _policy(folder, layout)
    load_training_state(info, models={"policy": again.model}, optimizer=again.optimizer, scheduler=again.scheduler)
    for number in (2, 3):
        _update(again, number)
    for old, new in zip(_weights(policy), _weights(again), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2**-7)  # backward passes add in no fixed order
