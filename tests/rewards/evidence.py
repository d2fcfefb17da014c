"""Evidence of one explanation, small enough to check its reward by hand."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rlt.config.reward import PenaltyConfig, RewardConfig
from megatron_rlt.rewards.rlt import rlt_reward
from megatron_rlt.types import LeakMetrics, Reward, RewardEvidence

NO_LEAKS = LeakMetrics(0.0, 0.0, 0.0, 0.0)
SOLUTION = torch.tensor([-0.5, -1.5, -1.0, -3.0])


def evidence_of(**changes: Any) -> RewardEvidence:
    """Two explanation tokens and four solution tokens; `changes` by the fields of `RewardEvidence`."""
    fields: dict[str, Any] = {
        "student_explanation_logprobs": torch.tensor([-2.0, -1.0]),
        "student_solution_logprobs": SOLUTION,
        "teacher_explanation_logprobs": torch.tensor([-0.5, -1.5]),
        "baseline_solution_logprobs": None,
        "divergence": None,
        "flags": frozenset(),
        "leaks": NO_LEAKS,
        "one_tokenizer": True,
    }
    return RewardEvidence(**(fields | changes))


def reward_of(settings: dict[str, Any] | None = None, **changes: Any) -> Reward:
    """The reward of `evidence_of(**changes)`; `settings` override those of the paper with a penalty for truncation."""
    config = {"penalties": PenaltyConfig(truncated=-0.25)} | (settings or {})
    return rlt_reward(evidence_of(**changes), RewardConfig(**config))
