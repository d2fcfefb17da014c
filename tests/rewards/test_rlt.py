"""The RLT reward on numbers small enough to check by hand, and its KL estimators by enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.sections import PenaltyConfig
from megatron_rlt.rewards.rlt import kl_per_token, penalty_table, reward_terms, rlt_reward, total_penalty, why_invalid
from megatron_rlt.types import FormatFlag, RewardParts

PENALTIES = penalty_table(PenaltyConfig(truncated=-0.25))


def reward_of(**changes: Any) -> RewardParts:
    arguments: dict[str, Any] = {
        "student_explanation_logprobs": torch.tensor([-2.0, -1.0]),
        "student_solution_logprobs": torch.tensor([-0.5, -1.5, -1.0, -3.0]),
        "teacher_explanation_logprobs": torch.tensor([-0.5, -1.5]),
        "explanation_divergence": None,
        "flags": frozenset(),
        "alpha": 0.01,
        "lambda_kl": 3.0,
        "kl_estimator": "k1",
        "penalties": PENALTIES,
    }
    return rlt_reward(**(arguments | changes))


def test_the_paper_reward_by_hand() -> None:
    """r_SS = -6/4 + 0.01 * -3 = -1.53; k1 = (1.5, -0.5): r_KL = 0.5 + 0.01 * 1.5 = 0.515; r = -1.53 - 1.545."""
    parts = reward_of()
    assert (parts.r_ss_mean, parts.r_ss_min, parts.r_kl_mean, parts.r_kl_max) == (-1.5, -3.0, 0.5, 1.5)
    assert parts.r_ss == pytest.approx(-1.53, abs=1e-12)
    assert parts.r_kl == pytest.approx(0.515, abs=1e-12)
    assert parts.reward == pytest.approx(-3.075, abs=1e-12)
    assert parts.kl_per_token.tolist() == [1.5, -0.5]
    assert parts.valid
    assert why_invalid(parts) is None


def test_k3_and_full_by_hand() -> None:
    """d = (1.5, -0.5): k3 = exp(-1.5) + 0.5, exp(0.5) - 1.5 = 0.723130, 0.148721; full takes what it is given."""
    assert reward_of(kl_estimator="k3").kl_per_token.tolist() == pytest.approx([0.723130, 0.148721], abs=1e-6)
    full = reward_of(kl_estimator="full", explanation_divergence=torch.tensor([0.25, 0.75]))
    assert (full.r_kl_mean, full.r_kl_max) == (0.5, 0.75)


def test_flags_add_their_penalties() -> None:
    parts = reward_of(flags={FormatFlag.MISSING_END_TAG, FormatFlag.TRUNCATED, FormatFlag.CONTAINS_TAGS})
    assert parts.penalty == -1.25
    assert parts.reward == pytest.approx(-3.075 - 1.25, abs=1e-12)


def test_every_flag_has_a_penalty_and_the_default_is_the_papers() -> None:
    table = penalty_table(PenaltyConfig())
    assert set(table) == set(FormatFlag)
    assert {flag for flag, value in table.items() if value} == {FormatFlag.MISSING_END_TAG}
    assert total_penalty(FormatFlag, table) == -1.0


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_an_empty_explanation_has_no_reward(estimator: str) -> None:
    empty = torch.empty(0)
    parts = reward_of(
        student_explanation_logprobs=empty,
        teacher_explanation_logprobs=empty,
        explanation_divergence=empty if estimator == "full" else None,
        kl_estimator=estimator,
        flags={FormatFlag.EMPTY},
    )
    assert not parts.valid
    assert why_invalid(parts) == "empty explanation"
    assert parts.r_ss == pytest.approx(-1.53, abs=1e-12)  # what there is to see is kept


def test_an_empty_solution_has_no_reward() -> None:
    parts = reward_of(student_solution_logprobs=torch.empty(0))
    assert not parts.valid
    assert why_invalid(parts) == "empty solution"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["student_explanation", "student_solution", "teacher_explanation"])
@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_a_non_finite_log_prob_anywhere_leaves_no_reward(which: str, value: float, alpha: float) -> None:
    broken = torch.tensor([-1.0, value])
    parts = reward_of(**{f"{which}_logprobs": broken}, alpha=alpha, lambda_kl=0.0)
    assert not parts.valid
    assert why_invalid(parts) == f"non-finite {which.replace('_', ' ')} log-prob"


def test_a_non_finite_divergence_leaves_no_reward() -> None:
    broken = torch.tensor([0.1, float("nan")])
    parts = reward_of(kl_estimator="full", explanation_divergence=broken, lambda_kl=0.0)
    assert why_invalid(parts) == "non-finite KL"


def test_a_non_finite_log_prob_counts_even_where_the_estimator_does_not_read_it() -> None:
    parts = reward_of(
        kl_estimator="full",
        explanation_divergence=torch.tensor([0.1, 0.2]),
        teacher_explanation_logprobs=torch.tensor([-1.0, float("-inf")]),
    )
    assert why_invalid(parts) == "non-finite teacher explanation log-prob"


def test_means_keep_what_bf16_would_lose() -> None:
    """2,000 log-ratios of 1 + k/4096: bf16 knows nothing between 1 and 1 + 1/128; the mean is 1 + 999.5/4096."""
    gaps = 1 + torch.arange(2000) / 4096
    student = torch.full((2000,), -3.0)
    parts = reward_of(student_explanation_logprobs=student, teacher_explanation_logprobs=student + gaps)
    assert parts.r_kl_mean == pytest.approx(1 + 999.5 / 4096, abs=1e-7)


def test_the_terms_sum_to_the_reward() -> None:
    parts = [reward_of(), reward_of(flags={FormatFlag.TRUNCATED}, kl_estimator="k3")]
    terms = reward_terms(parts, lambda_kl=3.0)
    total = torch.stack(list(terms.values())).sum(0)
    assert total.tolist() == pytest.approx([part.reward for part in parts], abs=1e-12)


def enumerated(estimator: str, teacher: Tensor, student: Tensor) -> float:
    """Expectation of the estimator over every token the teacher can sample."""
    per_token = kl_per_token(
        teacher_logprobs=teacher.log(), student_logprobs=student.log(), divergence=None, estimator=estimator
    )
    return float((teacher * per_token).sum())


def test_k1_and_k3_have_the_exact_divergence_as_their_mean() -> None:
    """Enumeration of a 4-token vocabulary: sum_x p(x) k(x) is KL(teacher || student), and not the reverse KL."""
    teacher = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    student = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    exact = float((teacher * (teacher / student).log()).sum())
    reverse = float((student * (student / teacher).log()).sum())
    assert enumerated("k1", teacher, student) == pytest.approx(exact, abs=1e-12)
    assert enumerated("k3", teacher, student) == pytest.approx(exact, abs=1e-12)
    assert abs(exact - reverse) > 0.05
    everywhere = kl_per_token(
        teacher_logprobs=teacher.log(), student_logprobs=student.log(), divergence=None, estimator="k3"
    )
    assert bool((everywhere >= 0).all())


def test_two_tokenizers_leave_r_ss_and_penalty_and_no_kl() -> None:
    """Three tokens of the teacher's against two of the student's: r = r_SS - 1 = -1.53 - 1."""
    arguments: dict[str, Any] = {
        "teacher_explanation_logprobs": torch.tensor([-0.5, -1.5, -0.25]),
        "flags": {FormatFlag.MISSING_END_TAG},
        "one_tokenizer": False,
    }
    parts = reward_of(lambda_kl=0.0, **arguments)
    assert parts.kl_per_token is None
    assert all(math.isnan(value) for value in (parts.r_kl, parts.r_kl_mean, parts.r_kl_max))
    assert parts.reward == pytest.approx(-2.53, abs=1e-12)
    assert why_invalid(parts) is None
    terms = {name: values.tolist() for name, values in reward_terms([parts], lambda_kl=0.0).items()}
    assert terms == {"r_ss": [parts.r_ss], "r_kl": [0.0], "penalty": [-1.0]}
    broken = reward_of(lambda_kl=0.0, **arguments | {"student_explanation_logprobs": torch.empty(0)})
    assert why_invalid(broken) == "empty explanation"
    with pytest.raises(AssertionError, match="needs one tokenizer"):
        reward_of(**arguments)
