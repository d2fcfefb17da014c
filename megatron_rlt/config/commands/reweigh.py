"""`reweigh`: stored rewards with other coefficients, without a model."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.config.commands.job import CommandConfig
from megatron_rlt.config.paths import output_file_faults
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.config.section import FilePath


class ReweighConfig(CommandConfig):
    """Compute stored rewards again with other coefficients, without a model: what would the ranking have been?"""

    source: FilePath
    """Parquet file of `score` or `collect`, or the run folder of a `train` with completions/step-N.parquet."""
    output: FilePath | None = None
    """Parquet file to write, rows in the source's order; None: only the table is printed."""
    reward: RewardConfig = RewardConfig()
    """RLT reward; a key that is not named keeps the value with which the source was made, whatever its default."""

    def written_files(self) -> tuple[Path, ...]:
        return () if self.output is None else (self.output,)

    def path_faults(self) -> list[str]:
        faults, output = [], self.output
        if not self.source.exists():
            faults.append(
                f"source: {self.source} does not exist; give a Parquet file of score or collect, or a run folder"
            )
        if output is not None and output.exists():
            faults.append(f"output: {output} exists, and nothing is overwritten; give another name, or remove it")
        elif output is not None:
            faults += output_file_faults("output", output)
        return faults
