"""The gap between sampling engine and trainer, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlt.algorithm.rollout_mismatch import quantile, rollout_gap, sequence_kl


def test_a_gap_by_hand() -> None:
    """Differences 0, -0.5, | 0.25, 2, 0: mean 2.75 / 5, the largest is the second completion's second token."""
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0, -0.5])]
    gap = rollout_gap([old[0] + torch.tensor([0.0, -0.5]), old[1] + torch.tensor([0.25, 2.0, 0.0])], old)
    assert gap.mean == pytest.approx(0.55)
    assert (gap.p99, gap.maximum) == (2.0, 2.0)
    assert (gap.worst_completion, gap.worst_token) == (1, 1)


def test_the_99th_percentile_leaves_one_token_in_a_hundred_out() -> None:
    """Of 1 .. 200, 198 are at most 198."""
    assert quantile(torch.arange(200, 0, -1).float(), 0.99) == 198.0


def test_the_sequence_kl_by_hand() -> None:
    """x = old - rollout: ln 2 and ln 1/2 in one completion, 0 in the other; k3(x) = e^x - 1 - x.

    (2 - 1 - ln 2) + (1/2 - 1 + ln 2) = 1/2, over two completions 1/4.
    """
    rollout = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0])]
    old = [rollout[0] + torch.tensor([math.log(2), -math.log(2)]), rollout[1]]
    assert sequence_kl(rollout, old) == pytest.approx(0.25, abs=1e-6)


def test_the_sequence_kl_estimates_the_divergence_of_two_samplers_of_two_tokens() -> None:
    """Engine p, trainer q, both with a second token that depends on the first; the exact KL sums over 9 sequences."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)]
    second = [torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2)]
    joint = [one[:, None] + two for one, two in zip(first, second, strict=True)]
    exact = float((joint[0].exp() * (joint[0] - joint[1])).sum())
    draws = torch.multinomial(joint[0].exp().flatten(), 40_000, replacement=True, generator=generator)
    a, b = draws // 3, draws % 3
    engine, trainer = (torch.stack([first[i][a], second[i][a, b]], 1) for i in range(2))
    estimate = sequence_kl(list(engine), list(trainer))
    assert exact > 0.1
    assert estimate == pytest.approx(exact, rel=0.05)  # the standard error is about 1 %


def test_a_nan_is_the_worst_of_all_and_stays_visible() -> None:
    old = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])]
    gap = rollout_gap([old[0] + 5, torch.tensor([-3.0, math.nan])], old)
    assert math.isnan(gap.maximum)
    assert math.isnan(gap.sequence_kl)
    assert (gap.worst_completion, gap.worst_token) == (1, 1)
