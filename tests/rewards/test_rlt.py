"""The RLT reward on numbers small enough to check by hand, and its KL estimators by enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.reward import PenaltyConfig, RewardConfig
from megatron_rlt.rewards.rlt import contribution
from megatron_rlt.rewards.terms import TERMS, kl_per_token
from megatron_rlt.types import FormatFlag
from tests.rewards.evidence import evidence_of, reward_of


def test_the_paper_reward_by_hand() -> None:
    """r_SS = -6/4 + 0.01 * -3 = -1.53; k1 = (1.5, -0.5): r_KL = 0.5 + 0.01 * 1.5 = 0.515; r = -1.53 - 1.545."""
    parts = reward_of()
    assert (parts.terms["r_ss_mean"], parts.terms["r_ss_min"], parts.terms["r_kl_mean"], parts.terms["r_kl_max"]) == (
        -1.5,
        -3.0,
        0.5,
        1.5,
    )
    assert parts.terms["r_ss"] == pytest.approx(-1.53, abs=1e-12)
    assert parts.terms["r_kl"] == pytest.approx(0.515, abs=1e-12)
    assert parts.total == pytest.approx(-3.075, abs=1e-12)
    assert parts.kl_per_token.tolist() == [1.5, -0.5]
    assert parts.dropped is None


def test_k3_and_full_by_hand() -> None:
    """d = (1.5, -0.5): k3 = exp(-1.5) + 0.5, exp(0.5) - 1.5 = 0.723130, 0.148721; full takes what it is given."""
    assert reward_of({"kl_estimator": "k3"}).kl_per_token.tolist() == pytest.approx([0.723130, 0.148721], abs=1e-6)
    full = reward_of({"kl_estimator": "full"}, divergence=torch.tensor([0.25, 0.75]))
    assert (full.terms["r_kl_mean"], full.terms["r_kl_max"]) == (0.5, 0.75)


def test_flags_add_their_penalties() -> None:
    parts = reward_of(flags={FormatFlag.MISSING_END_TAG, FormatFlag.TRUNCATED, FormatFlag.CONTAINS_TAGS})
    assert parts.terms["penalty"] == -1.25
    assert parts.total == pytest.approx(-3.075 - 1.25, abs=1e-12)


def test_every_flag_has_a_penalty_and_the_default_is_the_papers() -> None:
    penalties = vars(PenaltyConfig())
    assert set(penalties) == {flag.value for flag in FormatFlag}
    assert {name for name, value in penalties.items() if value} == {FormatFlag.MISSING_END_TAG}
    assert reward_of({"penalties": PenaltyConfig()}, flags=frozenset(FormatFlag)).terms["penalty"] == -1.0


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_an_empty_explanation_has_no_reward(estimator: str) -> None:
    empty = torch.empty(0)
    parts = reward_of(
        {"kl_estimator": estimator},
        student_explanation_logprobs=empty,
        teacher_explanation_logprobs=empty,
        divergence=empty if estimator == "full" else None,
        flags={FormatFlag.EMPTY},
    )
    assert math.isnan(parts.total)
    assert parts.dropped == "empty explanation"
    assert parts.terms["r_ss"] == pytest.approx(-1.53, abs=1e-12)  # what there is to see is kept


def test_an_empty_solution_has_no_reward() -> None:
    parts = reward_of(student_solution_logprobs=torch.empty(0))
    assert math.isnan(parts.total)
    assert parts.dropped == "empty solution"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["student_explanation", "student_solution", "teacher_explanation"])
@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_a_non_finite_log_prob_anywhere_leaves_no_reward(which: str, value: float, alpha: float) -> None:
    broken = torch.tensor([-1.0, value])
    parts = reward_of({"alpha": alpha, "lambda_kl": 0.0}, **{f"{which}_logprobs": broken})
    assert math.isnan(parts.total)
    assert parts.dropped == f"non-finite {which.replace('_', ' ')} log-prob"


def test_a_non_finite_divergence_leaves_no_reward() -> None:
    broken = torch.tensor([0.1, float("nan")])
    parts = reward_of({"kl_estimator": "full", "lambda_kl": 0.0}, divergence=broken)
    assert parts.dropped == "non-finite KL"


def test_a_non_finite_log_prob_counts_even_where_the_estimator_does_not_read_it() -> None:
    parts = reward_of(
        {"kl_estimator": "full"},
        divergence=torch.tensor([0.1, 0.2]),
        teacher_explanation_logprobs=torch.tensor([-1.0, float("-inf")]),
    )
    assert parts.dropped == "non-finite teacher explanation log-prob"


def test_means_keep_what_bf16_would_lose() -> None:
    """2,000 log-ratios of 1 + k/4096: bf16 knows nothing between 1 and 1 + 1/128; the mean is 1 + 999.5/4096."""
    gaps = 1 + torch.arange(2000) / 4096
    student = torch.full((2000,), -3.0)
    parts = reward_of(student_explanation_logprobs=student, teacher_explanation_logprobs=student + gaps)
    assert parts.terms["r_kl_mean"] == pytest.approx(1 + 999.5 / 4096, abs=1e-7)


def test_the_terms_sum_to_the_reward() -> None:
    settings = RewardConfig(kl_estimator="k3")
    for parts in (reward_of(vars(settings)), reward_of(vars(settings), flags=frozenset({FormatFlag.MISSING_END_TAG}))):
        assert sum(contribution(term, parts.terms, settings) for term in TERMS) == pytest.approx(parts.total, abs=1e-12)


def per_token(estimator: Any, teacher: Tensor, student: Tensor) -> Tensor:
    evidence = evidence_of(teacher_explanation_logprobs=teacher.log(), student_explanation_logprobs=student.log())
    found = kl_per_token(evidence, RewardConfig(kl_estimator=estimator))
    assert found is not None
    return found


def enumerated(estimator: str, teacher: Tensor, student: Tensor) -> float:
    """Expectation of the estimator over every token the teacher can sample."""
    return float((teacher * per_token(estimator, teacher, student)).sum())


def test_k1_and_k3_have_the_exact_divergence_as_their_mean() -> None:
    """Enumeration of a 4-token vocabulary: sum_x p(x) k(x) is KL(teacher || student), and not the reverse KL."""
    teacher = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    student = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    exact = float((teacher * (teacher / student).log()).sum())
    reverse = float((student * (student / teacher).log()).sum())
    assert enumerated("k1", teacher, student) == pytest.approx(exact, abs=1e-12)
    assert enumerated("k3", teacher, student) == pytest.approx(exact, abs=1e-12)
    assert abs(exact - reverse) > 0.05
    everywhere = per_token("k3", teacher, student)
    assert bool((everywhere >= 0).all())


def test_two_tokenizers_leave_r_ss_and_penalty_and_no_kl() -> None:
    """Three tokens of the teacher's against two of the student's: r = r_SS - 1 = -1.53 - 1."""
    arguments: dict[str, Any] = {
        "teacher_explanation_logprobs": torch.tensor([-0.5, -1.5, -0.25]),
        "flags": {FormatFlag.MISSING_END_TAG},
        "one_tokenizer": False,
    }
    parts = reward_of({"lambda_kl": 0.0}, **arguments)
    assert parts.kl_per_token is None
    assert all(math.isnan(value) for value in (parts.terms["r_kl"], parts.terms["r_kl_mean"], parts.terms["r_kl_max"]))
    assert parts.total == pytest.approx(-2.53, abs=1e-12)
    assert parts.dropped is None
    added = {term.name: contribution(term, parts.terms, RewardConfig(lambda_kl=0.0)) for term in TERMS}
    assert added == {"r_ss": parts.terms["r_ss"], "r_kl": 0.0, "penalty": -1.0}
    broken = reward_of({"lambda_kl": 0.0}, **arguments | {"student_explanation_logprobs": torch.empty(0)})
    assert broken.dropped == "empty explanation"
    with pytest.raises(AssertionError, match="needs one tokenizer"):
        reward_of(**arguments)
