"""TODO megatron_rlt/config/commands/reweigh.py."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.config.sections import (
    RewardConfig,
    Section,
)


class ReweighConfig(Section):
    """`megatron-rlt reweigh`: rewards that were stored with their log-probs, computed again, without a model."""

    source: Path
    """Parquet file of `score` or `collect`, or the run folder of a `train` with completions/step-N.parquet."""
    output: Path | None = None
    """Parquet file to write, rows in the source's order; None: only the table is printed."""
    reward: RewardConfig = RewardConfig()
    """RLT reward; what is not named stays as it was when the source was made, whatever the defaults are."""


def reweigh_path_faults(config: ReweighConfig) -> list[str]:
    """Broken rules about the files of `reweigh`."""
    faults, output = [], config.output
    if not config.source.exists():
        faults.append(
            f"source: {config.source} does not exist; give a Parquet file of score or collect, or a run folder"
        )
    if output is not None and output.exists():
        faults.append(f"output: {output} exists, and nothing is overwritten; give another name, or remove it")
    elif output is not None and output.suffix != ".parquet":
        faults.append(f"output: {output} must be a Parquet file to write; give a name that ends in .parquet")
    return faults
