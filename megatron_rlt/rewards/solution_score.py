"""r_SS in other units than the paper's log-prob: probability, or gain over having no explanation.

In: the student's log-probs of one solution. Out: mean, worst token and r_SS, and a reward that takes them over.
Leaves to others: the student's second pass without an explanation, and everything about r_KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_rlt.rewards.rlt import kl_term
from megatron_rlt.types import RewardParts

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
