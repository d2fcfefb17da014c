"""What a malformed explanation costs: the flags of its form, turned into one number added to the reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_rlt.config.sections import PenaltyConfig
from megatron_rlt.types import FormatFlag


def penalty_table(config: PenaltyConfig) -> dict[FormatFlag, float]:
    """The configured penalty of every flag; fails on a flag that the configuration does not know."""
    configured = config.model_dump()
    return {flag: float(configured[flag.value]) for flag in FormatFlag}


def total_penalty(flags: Iterable[FormatFlag], penalties: Mapping[FormatFlag, float]) -> float:
    """Sum over the flags an explanation has; 0.0 for a well-formed one."""
    return sum((penalties[flag] for flag in sorted(set(flags))), 0.0)
