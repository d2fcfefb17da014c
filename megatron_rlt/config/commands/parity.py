"""The configuration of `parity`: that of a `train`, and what is compared."""

from __future__ import annotations

from typing import Literal

from megatron_rlt.config.commands.train import TrainConfig
from megatron_rlt.config.sections import PositiveFloat, PositiveInt, Section


class ParityCheckConfig(Section):
    """Which tokens go through all programs, and how far these may differ."""

    completions: Literal["sampled", "given"] = "sampled"
    """Completions of the rows' prompts: sampled by the job's engine, or each row's reasoning_trace, which no engine
    sampled, so that its log-probs are not among those compared."""
    num_rows: PositiveInt = 8
    """Rows taken, from the first of the data set on; fewer if it has fewer."""
    max_gap: PositiveFloat = 1e-3
    """Largest difference of two log-probs of one token, in nats, above which the exit status is 1; with dtype bfloat16
    some 0.5 is usual."""


class ParityConfig(TrainConfig):
    """`megatron-rlt parity`: the same tokens through every program that gives log-probs, laid out as a `train`."""

    parity: ParityCheckConfig = ParityCheckConfig()
    """Tokens and bound."""
