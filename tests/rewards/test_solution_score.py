"""r_SS in other units, and several students, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.config.models import ModelConfig
from megatron_rlt.config.reward import RewardConfig, StudentsConfig
from megatron_rlt.rewards.rlt import combine_students
from megatron_rlt.rewards.terms import solution_values
from megatron_rlt.types import FormatFlag, Reward
from tests.rewards.evidence import SOLUTION, evidence_of, reward_of

BASELINE = torch.tensor([-1.0, -1.0, -2.0, -6.0])
NAN = float("nan")
Score = tuple[float, ...]


def score_of(unit: Any, logprobs: torch.Tensor = SOLUTION, baseline: torch.Tensor | None = None) -> Score:
    """r_SS, mean and worst token."""
    evidence = evidence_of(student_solution_logprobs=logprobs, baseline_solution_logprobs=baseline)
    return solution_values(evidence, None, RewardConfig(solution_unit=unit, alpha=0.1))


def gain_of(baseline: torch.Tensor = BASELINE, **changes: Any) -> Reward:
    settings = {"solution_unit": "gain", "alpha": 0.1}
    flags = frozenset({FormatFlag.TRUNCATED})
    return reward_of(settings, baseline_solution_logprobs=baseline, flags=flags, **changes)


def test_logprob_by_hand() -> None:
    """-6 / 4 = -1.5; the worst -3: -1.5 + 0.1 * -3."""
    r_ss, *rest = score_of("logprob")
    assert rest == [-1.5, -3.0]
    assert r_ss == pytest.approx(-1.8, abs=1e-12)


def test_probability_is_the_geometric_mean() -> None:
    """The fourth root of the product of 1/2, 1/8, 1/4, 1/4 is (1/256)^(1/4) = 1/4; the smallest is 1/8."""
    r_ss, mean, worst = score_of("probability", torch.tensor([0.5, 0.125, 0.25, 0.25], dtype=torch.float64).log())
    assert mean == pytest.approx(0.25, abs=1e-12)
    assert worst == pytest.approx(0.125, abs=1e-12)
    assert r_ss == pytest.approx(0.2625, abs=1e-12)


def test_gain_by_hand() -> None:
    """Gains 0.5, -0.5, 1, 3: mean 1; the worst is the second token, although the fourth is the least likely one."""
    r_ss, *rest = score_of("gain", baseline=BASELINE)
    assert rest == [1.0, -0.5]
    assert r_ss == pytest.approx(0.95, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=8))
def test_an_explanation_that_changes_nothing_gains_nothing(values: list[float]) -> None:
    assert score_of("gain", torch.tensor(values), torch.tensor(values)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("unit", ["logprob", "probability", "gain"])
@pytest.mark.parametrize("broken", [[], [-1.0, NAN], [float("-inf")]])
def test_an_unusable_solution_has_no_reward(unit: str, broken: list[float]) -> None:
    values, baseline = torch.tensor(broken), torch.zeros(len(broken))
    parts = reward_of({"solution_unit": unit}, student_solution_logprobs=values, baseline_solution_logprobs=baseline)
    assert math.isnan(parts.total)
    assert parts.dropped == ("non-finite student solution log-prob" if broken else "empty solution")
    if unit != "logprob":
        assert all(math.isnan(value) for value in score_of(unit, values, baseline))


def test_another_unit_goes_into_the_reward() -> None:
    """r_KL = 0.5 + 0.1 * 1.5 = 0.65; with the gain 0.95: 0.95 - 3 * 0.65 - 0.25 = -1.25."""
    parts = gain_of()
    assert parts.total == pytest.approx(-1.25, abs=1e-12)
    assert (parts.terms["r_ss_mean"], parts.terms["r_ss_min"]) == (1.0, -0.5)


def test_a_broken_baseline_leaves_no_gain() -> None:
    parts = gain_of(torch.tensor([-1.0, NAN, -2.0, -6.0]))
    assert math.isnan(parts.total)
    assert parts.dropped == "non-finite solution log-prob without explanation"


def students_of(totals: dict[str, float]) -> dict[str, Reward]:
    """Rewards that are these numbers: the log-prob of the solution's one token."""
    settings = {"alpha": 0.0, "lambda_kl": 0.0}
    return {
        name: reward_of(settings, student_solution_logprobs=torch.tensor([total])) for name, total in totals.items()
    }


def _settings(reduction: Any, held_out: str | None) -> StudentsConfig:
    return StudentsConfig(extra={"other": ModelConfig(model=Path("other"))}, reduction=reduction, held_out=held_out)


def combined(totals: dict[str, float], reduction: Any, held_out: str | None) -> float:
    return combine_students(students_of(totals), _settings(reduction, held_out)).total


def test_students_by_hand() -> None:
    rewards = {"7b": -1.0, "1b": -3.0, "llama": -8.0}
    assert combined(rewards, "mean", None) == -4.0
    assert combined(rewards, "mean", "llama") == -2.0
    assert combined(rewards, "minimum", None) == -8.0
    assert combined(rewards, "minimum", "llama") == -3.0


@pytest.mark.parametrize("reduction", ["mean", "minimum"])
def test_a_student_without_a_reward_leaves_none_unless_it_is_held_out(reduction: Any) -> None:
    assert math.isnan(combined({"a": -1.0, "b": NAN}, reduction, None))
    assert math.isnan(combined({"b": NAN, "a": -1.0}, reduction, None))
    assert combined({"a": -1.0, "b": NAN}, reduction, "b") == -1.0
    broken = combine_students(students_of({"a": -1.0, "b": NAN}), _settings(reduction, None))
    assert broken.dropped == "b: non-finite student solution log-prob"


def test_one_student_keeps_its_own_reward() -> None:
    (only,) = students_of({"a": -1.0}).values()
    assert combine_students({"a": only}, None) is only
