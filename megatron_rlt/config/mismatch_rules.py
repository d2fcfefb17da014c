"""Broken rules of the section `mismatch`, a line each."""

from __future__ import annotations

from megatron_rlt.config.mismatch import MismatchConfig


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
