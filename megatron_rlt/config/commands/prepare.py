"""TODO megatron_rlt/config/commands/prepare.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_rlt.config.commands.evaluate import HUB
from megatron_rlt.config.commands.path_rules import _folder_faults, _row_file_faults
from megatron_rlt.config.sections import (
    PositiveInt,
    Section,
)


class ColumnConfig(Section):
    """Names of the columns of the source rows."""

    question: str = "question"
    """Column of the question."""
    solution: str = "solution"
    """Column of the whole solution section."""
    reasoning_trace: str = "reasoning_trace"
    """Column of an existing explanation; may be absent."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    conversations: str = "conversations"
    """Column of Bespoke-Stratos-like turns, read where the question column is absent."""


class PrepareConfig(Section):
    """`megatron-rlt prepare`: rows to webdataset shards."""

    input: tuple[str, ...]
    """JSONL or Parquet files, or one `hf://name[:split]` data set of the Hugging Face hub."""
    output_dir: Path
    """Folder of the shards; must not hold another data set."""
    columns: ColumnConfig = ColumnConfig()
    """Column names."""
    rows_per_shard: PositiveInt = 1000
    """Rows in one shard."""
    max_characters: PositiveInt = 400_000
    """Longest question, solution or trace; a longer row is rejected by name."""
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of rejected rows above which nothing is written; 1.0 accepts any share below all."""


def prepare_path_faults(config: PrepareConfig) -> list[str]:
    """Broken rules about the files of `prepare`."""
    faults = _folder_faults("output_dir", config.output_dir)
    if not config.input:
        faults.append("input: is empty; name at least one .jsonl or .parquet file, or one hf://name[:split]")
    hub = [source for source in config.input if source.startswith(HUB)]
    if hub and len(config.input) > 1:
        faults.append(f"input: {hub[0]} must be the only input; prepare it and the files one by one")
    elif hub and find_spec("datasets") is None:
        faults.append(f"input: {hub[0]} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
    for source in config.input:
        if not source.startswith(HUB):
            faults += _row_file_faults("input", Path(source))
    return faults
