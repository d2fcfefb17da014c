"""The section on sampling engine and trainer disagreeing about the log-probs of the same tokens."""

from __future__ import annotations

from megatron_rlt.config.section import PositiveFloat, Section


class MismatchConfig(Section):
    """What is done about sampling log-probs that differ from the trainer's; everything is off by default."""

    max_rollout_gap: PositiveFloat | None = None
    """Largest |rollout - trainer| log-prob of a token, in nats, above which the run stops before the update; None:
    only logged. A resumed run may change it. Completions of older weights (rollout.ahead) are not held to it, except
    for the first step's."""
    token_weight_cap: PositiveFloat | None = None
    """Truncated importance sampling by token: weight min(exp(trainer - rollout), cap) in the policy loss; 2 is usual;
    None: off."""
    sequence_weight_cap: PositiveFloat | None = None
    """The same with the ratio of the whole completion as the weight of all its tokens; None: off."""
    token_ratio_min: PositiveFloat | None = None
    """Tokens whose exp(trainer - rollout) is below take no part in the loss, such as 0.5; None: all do."""
    token_ratio_max: PositiveFloat | None = None
    """Tokens whose exp(trainer - rollout) is above take no part in the loss, such as 2 or 5; None: all do."""
    sequence_ratio_min: PositiveFloat | None = None
    """Completions whose tokens' ratios have a geometric mean below take no part in the loss, such as 0.99; None: all
    do."""
    sequence_ratio_max: PositiveFloat | None = None
    """Completions whose tokens' ratios have a geometric mean above take no part in the loss, such as 1.01; None: all
    do."""

    @property
    def masks_tokens(self) -> bool:
        """Whether some tokens may take no part."""
        return self.token_ratio_min is not None or self.token_ratio_max is not None

    @property
    def masks_sequences(self) -> bool:
        """Whether some completions may take no part."""
        return self.sequence_ratio_min is not None or self.sequence_ratio_max is not None


# Broken rules of the section `mismatch`, a line each.
def mismatch_faults(mismatch: MismatchConfig) -> list[str]:
    """What does not go together in it."""
    faults = []
    if mismatch.token_weight_cap is not None and mismatch.sequence_weight_cap is not None:
        faults.append(
            f"mismatch.sequence_weight_cap={mismatch.sequence_weight_cap:g}: beside token_weight_cap="
            f"{mismatch.token_weight_cap:g} every token's ratio would count twice; set one of the two"
        )
    for name, low, high in (
        ("token_ratio", mismatch.token_ratio_min, mismatch.token_ratio_max),
        ("sequence_ratio", mismatch.sequence_ratio_min, mismatch.sequence_ratio_max),
    ):
        if low is not None and low > 1:
            faults.append(
                f"mismatch.{name}_min={low:g}: engine and trainer that agree have ratio 1, which must lie within;"
                " nearest valid: 1"
            )
        if high is not None and high < 1:
            faults.append(
                f"mismatch.{name}_max={high:g}: engine and trainer that agree have ratio 1, which must lie within;"
                " nearest valid: 1"
            )
    return faults
