"""Leak detectors on scoring pairs: what they count, and what the configured weights make of it.

The counting is `rewards/leaks.py`'s; here it meets the configuration and the explanations' texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_rlt.config.sections import LeakConfig
from megatron_rlt.rewards.answers import last_boxed
from megatron_rlt.rewards.leaks import LeakWeights, leak_metrics
from megatron_rlt.types import LeakMetrics, ScoringPair


def count_leaks(pairs: Sequence[ScoringPair], config: LeakConfig) -> tuple[LeakMetrics, ...]:
    """Of each pair's explanation; the answer that it may state is the last box of the solution."""
    return tuple(
        leak_metrics(
            pair.explanation_text,
            pair.problem.solution,
            answer=last_boxed(pair.problem.solution),
            ngram=config.ngram,
            closing_share=config.closing_share,
        )
        for pair in pairs
    )


def leak_weights(config: LeakConfig) -> LeakWeights:
    """The configured weight of every metric; fails on a metric that the configuration does not know."""
    configured = config.model_dump()
    return LeakWeights(**{field.name: float(configured[field.name]) for field in fields(LeakWeights)})
