"""r_SS in other units, and several students, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.rewards.rlt import SolutionScore, rlt_reward, solution_score, with_solution_score
from megatron_rlt.rewards.students import combine_students
from megatron_rlt.types import FormatFlag, RewardParts

LOGPROBS = torch.tensor([-0.5, -1.5, -1.0, -3.0])
BASELINE = torch.tensor([-1.0, -1.0, -2.0, -6.0])
NAN = float("nan")


def score_of(unit: Any, logprobs: torch.Tensor = LOGPROBS, baseline: torch.Tensor | None = None) -> SolutionScore:
    return solution_score(logprobs, baseline_logprobs=baseline, unit=unit, alpha=0.1)


def parts_of(solution_logprobs: torch.Tensor = LOGPROBS) -> RewardParts:
    return rlt_reward(
        student_explanation_logprobs=torch.tensor([-2.0, -1.0]),
        student_solution_logprobs=solution_logprobs,
        teacher_explanation_logprobs=torch.tensor([-0.5, -1.5]),
        explanation_divergence=None,
        flags={FormatFlag.TRUNCATED},
        alpha=0.1,
        lambda_kl=3.0,
        kl_estimator="k1",
        penalties={FormatFlag.TRUNCATED: -0.25},
    )


def test_logprob_by_hand() -> None:
    """-6 / 4 = -1.5; the worst -3: -1.5 + 0.1 * -3."""
    score = score_of("logprob")
    assert (score.mean, score.worst) == (-1.5, -3.0)
    assert score.r_ss == pytest.approx(-1.8, abs=1e-12)


def test_probability_is_the_geometric_mean() -> None:
    """The fourth root of the product of 1/2, 1/8, 1/4, 1/4 is (1/256)^(1/4) = 1/4; the smallest is 1/8."""
    score = score_of("probability", torch.tensor([0.5, 0.125, 0.25, 0.25], dtype=torch.float64).log())
    assert score.mean == pytest.approx(0.25, abs=1e-12)
    assert score.worst == pytest.approx(0.125, abs=1e-12)
    assert score.r_ss == pytest.approx(0.2625, abs=1e-12)


def test_gain_by_hand() -> None:
    """Gains 0.5, -0.5, 1, 3: mean 1; the worst is the second token, although the fourth is the least likely one."""
    score = score_of("gain", baseline=BASELINE)
    assert (score.mean, score.worst) == (1.0, -0.5)
    assert score.r_ss == pytest.approx(0.95, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=8))
def test_an_explanation_that_changes_nothing_gains_nothing(values: list[float]) -> None:
    assert score_of("gain", torch.tensor(values), torch.tensor(values)) == SolutionScore(0.0, 0.0, 0.0)


@pytest.mark.parametrize("unit", ["logprob", "probability", "gain"])
@pytest.mark.parametrize("broken", [[], [-1.0, NAN], [float("-inf")]])
def test_an_unusable_solution_has_no_score(unit: str, broken: list[float]) -> None:
    score = score_of(unit, torch.tensor(broken), torch.zeros(len(broken)))
    assert all(math.isnan(value) for value in (score.r_ss, score.mean, score.worst))


def test_the_papers_unit_leaves_the_reward_as_it_is() -> None:
    parts = parts_of()
    same = with_solution_score(parts, score_of("logprob"), lambda_kl=3.0)
    assert (same.reward, same.r_ss, same.r_ss_mean, same.r_ss_min) == (
        parts.reward,
        parts.r_ss,
        parts.r_ss_mean,
        parts.r_ss_min,
    )


def test_another_unit_goes_into_the_reward() -> None:
    """r_KL = 0.5 + 0.1 * 1.5 = 0.65; with the gain 0.95: 0.95 - 3 * 0.65 - 0.25 = -1.25."""
    parts = with_solution_score(parts_of(), score_of("gain", baseline=BASELINE), lambda_kl=3.0)
    assert parts.reward == pytest.approx(-1.25, abs=1e-12)
    assert (parts.r_ss_mean, parts.r_ss_min) == (1.0, -0.5)
    assert parts.student_solution_logprobs.tolist() == LOGPROBS.tolist()


def test_a_completion_without_a_reward_stays_without() -> None:
    parts = parts_of(torch.tensor([NAN]))
    assert not with_solution_score(parts, score_of("logprob"), lambda_kl=3.0).valid
    assert not with_solution_score(parts_of(), score_of("logprob", torch.empty(0)), lambda_kl=3.0).valid


def test_students_by_hand() -> None:
    rewards = {"7b": -1.0, "1b": -3.0, "llama": -8.0}
    assert combine_students(rewards, reduction="mean", held_out=None) == -4.0
    assert combine_students(rewards, reduction="mean", held_out="llama") == -2.0
    assert combine_students(rewards, reduction="minimum", held_out=None) == -8.0
    assert combine_students(rewards, reduction="minimum", held_out="llama") == -3.0


@pytest.mark.parametrize("reduction", ["mean", "minimum"])
def test_a_student_without_a_reward_leaves_none_unless_it_is_held_out(reduction: Any) -> None:
    assert math.isnan(combine_students({"a": -1.0, "b": NAN}, reduction=reduction, held_out=None))
    assert math.isnan(combine_students({"b": NAN, "a": -1.0}, reduction=reduction, held_out=None))
    assert combine_students({"a": -1.0, "b": NAN}, reduction=reduction, held_out="b") == -1.0


def test_a_held_out_student_must_exist_and_leave_one() -> None:
    with pytest.raises(AssertionError, match="none of the students"):
        combine_students({"a": -1.0}, reduction="mean", held_out="b")
    with pytest.raises(AssertionError, match="at least one student"):
        combine_students({"a": -1.0}, reduction="mean", held_out="a")
