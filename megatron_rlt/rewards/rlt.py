"""The RLT reward of one completion from per-token log-probs (arXiv 2506.08388, section 3).

    r    = r_SS - lambda * r_KL + penalty
    r_SS = mean_t log p_S(s_t | q, e, s_<t) + alpha * min_t ...      over solution tokens
    r_KL = mean_t KL_t + alpha * max_t KL_t                          over explanation tokens
    KL_t = KL(pi_T(. | q, s, e_<t) || p_S(. | q, e_<t))

In: log-probs that the engines computed, at one temperature. Out: the reward with every part it was computed from.
Leaves to others: the exact divergence over the vocabulary, comparing completions of a group, averaging over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_rlt.config.sections import PenaltyConfig
from megatron_rlt.types import FormatFlag, RewardParts

KlEstimator = Literal["k1", "k3", "full"]


_NAN = float("nan")


def rlt_reward(
    *,
    student_explanation_logprobs: Tensor,
    student_solution_logprobs: Tensor,
    teacher_explanation_logprobs: Tensor,
    explanation_divergence: Tensor | None,
    flags: Iterable[FormatFlag],
    alpha: float,
    lambda_kl: float,
    kl_estimator: KlEstimator,
    penalties: Mapping[FormatFlag, float],
    one_tokenizer: bool = True,
) -> RewardParts:
    """Reward of one explanation; sums are taken in float64.

    An explanation or a solution without tokens, or a non-finite value anywhere, makes the reward nan and the parts
    invalid (`why_invalid` names the reason); nothing is replaced. An explanation of white space has tokens, a reward
    and the flag `empty`. Without `one_tokenizer` there is no KL: its parts are nan, and the reward is r_SS + penalty.

    Args:
        student_explanation_logprobs: `[E]` log p_S of the sampled explanation tokens, given the question.
        student_solution_logprobs: `[S]` log p_S of the solution tokens, given question and explanation.
        teacher_explanation_logprobs: `[E]` log pi_T of the same explanation tokens, given question and solution.
        explanation_divergence: `[E]` exact KL(pi_T || p_S) in nats; needed by the estimator `full`, else None.
        flags: what is wrong with the explanation's form.
        alpha: weight of the worst token beside the mean.
        lambda_kl: weight of r_KL against r_SS.
        kl_estimator: how KL_t comes about, see `kl_per_token`.
        penalties: added to the reward for each flag.
        one_tokenizer: whether both models' explanation tokens are the same ones; else `lambda_kl` must be 0.
    """
    assert one_tokenizer or lambda_kl == 0, "r_KL needs one tokenizer"
    kl = None
    if one_tokenizer:
        kl = kl_per_token(
            teacher_logprobs=teacher_explanation_logprobs,
            student_logprobs=student_explanation_logprobs,
            divergence=explanation_divergence,
            estimator=kl_estimator,
        )
    solution = student_solution_logprobs.double()
    r_ss_mean, r_ss_min = (float(solution.mean()), float(solution.min())) if len(solution) else (_NAN, _NAN)
    r_kl_mean, r_kl_max = (_NAN, _NAN) if kl is None or len(kl) == 0 else (float(kl.mean()), float(kl.max()))
    r_ss, r_kl = r_ss_mean + alpha * r_ss_min, r_kl_mean + alpha * r_kl_max
    penalty = total_penalty(flags, penalties)
    usable = _all_finite(solution, student_explanation_logprobs, teacher_explanation_logprobs, kl)
    return RewardParts(
        reward=r_ss - (0.0 if kl is None else lambda_kl * r_kl) + penalty if usable else _NAN,
        r_ss=r_ss,
        r_ss_mean=r_ss_mean,
        r_ss_min=r_ss_min,
        r_kl=r_kl,
        r_kl_mean=r_kl_mean,
        r_kl_max=r_kl_max,
        penalty=penalty,
        kl_per_token=None if kl is None else kl.float(),
        student_solution_logprobs=student_solution_logprobs.float(),
        student_explanation_logprobs=student_explanation_logprobs.float(),
        teacher_explanation_logprobs=teacher_explanation_logprobs.float(),
    )


def _all_finite(solution: Tensor, student_explanation: Tensor, *others: Tensor | None) -> bool:
    """Whether solution and explanation have tokens, and every value that there is, is finite."""
    present = [solution, student_explanation, *(values for values in others if values is not None)]
    return len(solution) > 0 and len(student_explanation) > 0 and all(bool(each.isfinite().all()) for each in present)


def kl_per_token(
    *, teacher_logprobs: Tensor, student_logprobs: Tensor, divergence: Tensor | None, estimator: KlEstimator
) -> Tensor:
    """`[E]` float64: KL(teacher || student) at each token, for tokens `x` that the teacher sampled.

    With `d = log p_T(x) - log p_S(x)`:
      k1    d itself: right on average, negative at times (the paper's code).
      k3    r - 1 - log r with r = p_S(x) / p_T(x), that is exp(-d) - 1 + d. Under the teacher E[r] = 1, so it is
            right on average too, and never negative (Schulman, "Approximating KL divergence").
      full  the given divergence over the whole vocabulary: no sampling error.
    """
    assert teacher_logprobs.shape == student_logprobs.shape, "teacher and student must score the same tokens"
    gap = teacher_logprobs.double() - student_logprobs.double()
    if estimator == "k1":
        return gap
    if estimator == "k3":
        return torch.expm1(-gap) + gap
    assert divergence is not None, "the estimator `full` needs the exact divergence"
    assert divergence.shape == gap.shape, f"{divergence.shape} divergences for {gap.shape} explanation tokens"
    return divergence.double()


def why_invalid(parts: RewardParts) -> str | None:
    """Why a completion has no reward, for counting and for people; None if it has one."""
    if parts.valid:
        return None
    if len(parts.student_solution_logprobs) == 0:
        return "empty solution"
    if len(parts.student_explanation_logprobs) == 0:
        return "empty explanation"
    per_token: dict[str, Tensor | None] = {
        "student solution log-prob": parts.student_solution_logprobs,
        "student explanation log-prob": parts.student_explanation_logprobs,
        "teacher explanation log-prob": parts.teacher_explanation_logprobs,
        "KL": parts.kl_per_token,
    }
    return next(
        (
            f"non-finite {name}"
            for name, values in per_token.items()
            if values is not None and not values.isfinite().all()
        ),
        "non-finite solution log-prob without explanation",
    )


def kl_term(parts: RewardParts, *, lambda_kl: float) -> float:
    """What r_KL adds to the reward: `-lambda * r_KL`, 0 where there is no r_KL."""
    return 0.0 if parts.kl_per_token is None else -lambda_kl * parts.r_kl


def reward_terms(parts: Sequence[RewardParts], *, lambda_kl: float) -> dict[str, Tensor]:
    """The summands of many rewards, with their signs: `[N]` float64 each, together `reward`."""
    return {
        "r_ss": torch.tensor([part.r_ss for part in parts], dtype=torch.float64),
        "r_kl": torch.tensor([kl_term(part, lambda_kl=lambda_kl) for part in parts], dtype=torch.float64),
        "penalty": torch.tensor([part.penalty for part in parts], dtype=torch.float64),
    }


# What a malformed explanation costs: the flags of its form, turned into one number added to the reward.
def penalty_table(config: PenaltyConfig) -> dict[FormatFlag, float]:
    """The configured penalty of every flag; fails on a flag that the configuration does not know."""
    configured = config.model_dump()
    return {flag: float(configured[flag.value]) for flag in FormatFlag}


def total_penalty(flags: Iterable[FormatFlag], penalties: Mapping[FormatFlag, float]) -> float:
    """Sum over the flags an explanation has; 0.0 for a well-formed one."""
    return sum((penalties[flag] for flag in sorted(set(flags))), 0.0)


# r_SS in other units than the paper's log-prob: probability, or gain over having no explanation.
#
# In: the student's log-probs of one solution. Out: mean, worst token and r_SS, and a reward that takes them over.
# Leaves to others: the student's second pass without an explanation, and everything about r_KL.
SolutionUnit = Literal["logprob", "probability", "gain"]


@dataclass(frozen=True)
class SolutionScore:
    """How well the student predicts a solution; all three are nan if the solution is empty or a value not finite."""

    r_ss: float  # mean + alpha * worst
    mean: float
    worst: float


def solution_score(
    logprobs: Tensor, *, baseline_logprobs: Tensor | None, unit: SolutionUnit, alpha: float
) -> SolutionScore:
    """`mean + alpha * worst` over the solution's tokens, in float64.

    With `l_t = log p_S(s_t | q, e, s_<t)`:
      logprob      mean_t l_t and min_t l_t: the paper's r_SS, the same to the bit as in `rlt_reward`.
      probability  exp(mean_t l_t), the geometric mean of the tokens' probabilities, and exp(min_t l_t).
      gain         mean_t and min_t of l_t - log p_S(s_t | q, s_<t), in nats a token. The baseline is the same for all
                   explanations of a question, so within a group the mean ranks as `logprob` does; the worst token is
                   the one that the explanation made hardest to predict, not the one that is hard anyway.

    Args:
        logprobs: `[S]` after the explanation.
        baseline_logprobs: `[S]` of the same tokens without an explanation; needed by `gain`, else not read.
        alpha: weight of the worst token beside the mean.
    """
    values = logprobs.double()
    if unit == "gain":
        assert baseline_logprobs is not None, "a gain needs the log-probs without an explanation"
        assert baseline_logprobs.shape == values.shape, "the baseline must score the same tokens"
        values = values - baseline_logprobs.double()
    if len(values) == 0 or not bool(values.isfinite().all()):
        return SolutionScore(math.nan, math.nan, math.nan)
    mean, worst = float(values.mean()), float(values.min())
    if unit == "probability":
        mean, worst = math.exp(mean), math.exp(worst)
    return SolutionScore(mean + alpha * worst, mean, worst)


def with_solution_score(parts: RewardParts, score: SolutionScore, *, lambda_kl: float) -> RewardParts:
    """The reward `r_SS - lambda_kl * r_KL + penalty` with another r_SS; invalid parts stay invalid."""
    reward = score.r_ss + kl_term(parts, lambda_kl=lambda_kl) + parts.penalty
    return replace(
        parts,
        reward=reward if parts.valid else parts.reward,
        r_ss=score.r_ss,
        r_ss_mean=score.mean,
        r_ss_min=score.worst,
    )
