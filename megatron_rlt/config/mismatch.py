"""The section on sampling engine and trainer disagreeing about the log-probs of the same tokens."""

from __future__ import annotations

from megatron_rlt.config.sections import PositiveFloat, Section


class MismatchConfig(Section):
    """What is done about sampling log-probs that differ from the trainer's; everything is off by default."""

    max_rollout_gap: PositiveFloat | None = None
    """Largest |rollout - trainer| log-prob of a token, in nats, above which the run stops before the update; None:
    only logged. A resumed run may change it."""
