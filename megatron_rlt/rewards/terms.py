"""The terms of the RLT reward, declared once: `TERMS` gives formulas, weights, stored columns, metrics and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.types import RewardEvidence

_MISSING = (math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class RewardTerm:
    """One summand of the reward: `weight * value`. A term whose value is nan does not exist and adds nothing."""

    labels: Mapping[str, str]  # name -> label of each stored value: the term itself, then what it is made of
    weight: Callable[[RewardConfig], float]
    values: Callable[[RewardEvidence, Tensor | None, RewardConfig], tuple[float, ...]]
    """(evidence, `[E]` float64 KL per token or None, settings) -> values in the order of `labels`."""

    @property
    def name(self) -> str:
        return next(iter(self.labels))


def kl_per_token(evidence: RewardEvidence, settings: RewardConfig) -> Tensor | None:
    """`[E]` float64: KL(teacher || student) at each token `x` that the teacher sampled; None with two tokenizers.

    With `d = log p_T(x) - log p_S(x)`:
      k1    d itself: unbiased, negative at times (the paper's code).
      k3    r - 1 - log r with r = p_S(x) / p_T(x), that is exp(-d) - 1 + d. Under the teacher E[r] = 1, so it is
            unbiased too, and never negative (Schulman, "Approximating KL divergence").
      full  the exact divergence over the whole vocabulary: no sampling error.
    """
    if not evidence.one_tokenizer:
        return None
    teacher, student = evidence.teacher_explanation_logprobs, evidence.student_explanation_logprobs
    assert teacher.shape == student.shape, "teacher and student must score the same tokens"
    gap = teacher.double() - student.double()
    if settings.kl_estimator == "k1":
        return gap
    if settings.kl_estimator == "k3":
        return torch.expm1(-gap) + gap
    exact = evidence.divergence
    assert exact is not None, "the estimator `full` needs the exact divergence"
    assert exact.shape == gap.shape, f"{exact.shape} divergences for {gap.shape} explanation tokens"
    return exact.double()


def solution_values(evidence: RewardEvidence, _kl: Tensor | None, settings: RewardConfig) -> tuple[float, ...]:
    """`r_SS = mean + alpha * worst` over the solution's tokens, then mean and worst, in float64.

    With `l_t = log p_S(s_t | q, e, s_<t)`:
      logprob      mean_t l_t and min_t l_t: the paper's r_SS.
      probability  exp(mean_t l_t), the geometric mean of the tokens' probabilities, and exp(min_t l_t).
      gain         mean_t and min_t of l_t - log p_S(s_t | q, s_<t), in nats per token. All explanations of a question
                   share the baseline, so within a group the mean ranks as `logprob` does; the worst token is the one
                   that the explanation made hardest to predict, not the one that is hard anyway.
    """
    values = evidence.student_solution_logprobs.double()
    if settings.solution_unit == "gain":
        baseline = evidence.baseline_solution_logprobs
        assert baseline is not None, "a gain needs the log-probs without an explanation"
        assert baseline.shape == values.shape, "the baseline must score the same tokens"
        values = values - baseline.double()
    if len(values) == 0 or (settings.solution_unit != "logprob" and not bool(values.isfinite().all())):
        return _MISSING
    mean, worst = float(values.mean()), float(values.min())
    if settings.solution_unit == "probability":
        mean, worst = math.exp(mean), math.exp(worst)
    return mean + settings.alpha * worst, mean, worst


def _kl_values(_evidence: RewardEvidence, kl: Tensor | None, settings: RewardConfig) -> tuple[float, ...]:
    if kl is None or len(kl) == 0:
        return _MISSING
    mean, worst = float(kl.mean()), float(kl.max())
    return mean + settings.alpha * worst, mean, worst


def _penalty_values(evidence: RewardEvidence, _kl: Tensor | None, settings: RewardConfig) -> tuple[float, ...]:
    """Penalties of the flags, and `sum_m weight_m * metric_m` over the leak metrics."""
    penalties, weights = vars(settings.penalties), vars(settings.leaks)
    form = sum((penalties[flag.value] for flag in sorted(evidence.flags)), 0.0)
    return (form + float(sum(weights[name] * metric for name, metric in vars(evidence.leaks).items())),)


TERMS = (
    RewardTerm(
        labels={"r_ss": "r_SS", "r_ss_mean": "  mean solution token", "r_ss_min": "  worst solution token"},
        weight=lambda _: 1.0,
        values=solution_values,
    ),
    RewardTerm(
        labels={"r_kl": "r_KL", "r_kl_mean": "  mean explanation token", "r_kl_max": "  worst explanation token"},
        weight=lambda settings: -settings.lambda_kl,
        values=_kl_values,
    ),
    RewardTerm(labels={"penalty": "penalty"}, weight=lambda _: 1.0, values=_penalty_values),
)
"""In the order in which they are added up."""

LABELS = {name: label for term in TERMS for name, label in term.labels.items()}
"""Every stored value with its label for people: a column of the store and a metric each."""
