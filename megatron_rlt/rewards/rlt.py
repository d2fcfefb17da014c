"""The RLT reward of one completion from per-token log-probs (arXiv 2506.08388, section 3).

    r    = r_SS - lambda * r_KL + penalty
    r_SS = mean_t log p_S(s_t | q, e, s_<t) + alpha * min_t ...      over solution tokens
    r_KL = mean_t KL_t + alpha * max_t KL_t                          over explanation tokens
    KL_t = KL(pi_T(. | q, s, e_<t) || p_S(. | q, e_<t))

All log-probs are at one temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from megatron_rlt.config.reward import RewardConfig, StudentsConfig
from megatron_rlt.rewards.terms import TERMS, RewardTerm, kl_per_token
from megatron_rlt.types import Reward, RewardEvidence


def rlt_reward(evidence: RewardEvidence, settings: RewardConfig) -> Reward:
    """Compute all terms and total them once; sums are taken in float64.

    An explanation or a solution without tokens, or a non-finite value anywhere, leaves no reward: nothing is replaced.
    An explanation of white space has tokens, a reward and the flag `empty`. With two tokenizers there is no KL: its
    values are nan, and the reward is r_SS + penalty; `settings.lambda_kl` must be 0.
    """
    assert evidence.one_tokenizer or settings.lambda_kl == 0, "r_KL needs one tokenizer"
    kl = kl_per_token(evidence, settings)
    terms: dict[str, float] = {}
    for term in TERMS:
        terms |= dict(zip(term.labels, term.values(evidence, kl, settings), strict=True))
    dropped = _why_dropped(evidence, kl, settings)
    total = sum((contribution(term, terms, settings) for term in TERMS), 0.0)
    return Reward(
        total=total if dropped is None else math.nan,
        terms=terms,
        kl_per_token=None if kl is None else kl.float(),
        dropped=dropped,
        evidence=evidence,
    )


def contribution(term: RewardTerm, values: Mapping[str, float], settings: RewardConfig) -> float:
    """What a term adds to the reward, with its sign; 0.0 where it does not exist."""
    value = values[term.name]
    return 0.0 if math.isnan(value) else term.weight(settings) * value


def combine_students(rewards: Mapping[str, Reward], settings: StudentsConfig | None) -> Reward:
    """The first student's reward with the total that the teacher is trained on: mean or minimum of those that count.

    A held-out student is logged and does not count. If a student that counts has no reward, there is none: rewards of
    others would otherwise be compared with it within its group. With one student its own reward, to the bit.
    """
    first = next(iter(rewards.values()))
    if settings is None:
        return first
    counted = {name: reward for name, reward in rewards.items() if name != settings.held_out}
    assert counted, "at least one student must count"
    dropped = next((f"{name}: {one.dropped}" for name, one in counted.items() if one.dropped is not None), None)
    totals = [reward.total for reward in counted.values()]
    combined = min(totals) if settings.reduction == "minimum" else math.fsum(totals) / len(totals)
    return replace(first, total=combined if dropped is None else math.nan, dropped=dropped)


def _why_dropped(evidence: RewardEvidence, kl: Tensor | None, settings: RewardConfig) -> str | None:
    if len(evidence.student_solution_logprobs) == 0:
        return "empty solution"
    if len(evidence.student_explanation_logprobs) == 0:
        return "empty explanation"
    read: dict[str, Tensor | None] = {
        "student solution log-prob": evidence.student_solution_logprobs,
        "student explanation log-prob": evidence.student_explanation_logprobs,
        "teacher explanation log-prob": evidence.teacher_explanation_logprobs,
        "KL": kl,
        "solution log-prob without explanation": (
            evidence.baseline_solution_logprobs if settings.solution_unit == "gain" else None
        ),
    }
    broken = (name for name, values in read.items() if values is not None and not values.isfinite().all())
    return next((f"non-finite {name}" for name in broken), None)
