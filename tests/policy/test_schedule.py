"""Learning rates of all updates of a run against transformers' own schedules, and a run of one update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig, num_warmup_updates
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.policy.optimizer import build_scheduler
from megatron_rlt.policy.policy import Policy
from megatron_rlt.types import Span, SpannedSequence
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

PEAK = 3e-4


class Groups:
    """What a schedule needs of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, float]] = [{"lr": 0.0}]


def our_rates(settings: OptimizerConfig, updates: int) -> list[float]:
    groups = Groups()
    scheduler: OptimizerParamScheduler = build_scheduler(groups, settings, num_updates=updates)  # type: ignore[arg-type]
    rates = []
    for _ in range(updates):
        rates.append(groups.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


def transformers_rates(settings: OptimizerConfig, updates: int, warmup: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if settings.schedule == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    elif settings.schedule == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, updates)
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, updates, min_lr=settings.min_lr)
    rates = []
    for _ in range(updates):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "min_lr"), [("constant", 0.0), ("linear", 0.0), ("cosine", 0.0), ("cosine", 1e-5)]
)
@pytest.mark.parametrize("updates", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.9])
def test_the_rates_are_those_of_transformers(schedule: str, min_lr: float, updates: int, fraction: float) -> None:
    settings = OptimizerConfig(lr=PEAK, min_lr=min_lr, schedule=schedule, warmup_fraction=fraction)  # type: ignore[arg-type]
    warmup = num_warmup_updates(settings, updates)
    rates = our_rates(settings, updates)
    assert rates == pytest.approx(transformers_rates(settings, updates, warmup), rel=1e-6)
    assert max(rates) == pytest.approx(PEAK)
    assert rates[-1] > min_lr
    assert rates[0] == (0.0 if warmup else pytest.approx(PEAK))


def test_rates_by_hand() -> None:
    linear = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="linear", warmup_fraction=0.25)
    # 8 updates, 2 of warm-up: 0, 1/2 of the peak; then 0.2 + 0.8 x (6 - n)/6 for n = 0..5.
    assert our_rates(linear, 8) == pytest.approx(
        [0, 0.5, 1, 0.2 + 4 / 6, 0.2 + 3.2 / 6, 0.6, 0.2 + 1.6 / 6, 0.2 + 0.8 / 6]
    )


def largest_change_by_one_update(folder: Path, schedule: str) -> float:
    model = load_model(ModelConfig(model=folder, dtype="float32"), build_layout(LayoutConfig()))
    policy = Policy(
        model,
        optimizer=OptimizerConfig(lr=1e-3, schedule=schedule, warmup_fraction=0.05),  # type: ignore[arg-type]
        blocks=ScoringConfig(),
        temperature=1.0,
        max_tokens_per_pack=1000,
        micro_batch_size=1,
        num_updates=1,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(_: PackedBatch, logprobs: Tensor, __: Tensor) -> tuple[Tensor, None]:
        return -logprobs.mean(), None

    assert policy.update([SpannedSequence(torch.arange(9), (Span(1, 9),))], loss).lr == pytest.approx(1e-3)
    return max(float((new - old).abs().max()) for new, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_of_one_step_trains(schedule: str, tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=True)
    # Adam's first step moves every weight with a gradient by the rate.
    assert run_ranks(largest_change_by_one_update, 1, folder, schedule) == [pytest.approx(1e-3, rel=1e-2)]
