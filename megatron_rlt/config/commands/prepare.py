"""`prepare`: rows to webdataset shards."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from megatron_rlt.config.commands.job import CommandConfig
from megatron_rlt.config.paths import HUB, folder_faults, row_file_faults
from megatron_rlt.config.section import FilePath, PositiveInt, Section, with_home


def named_columns(columns: Section) -> frozenset[str]:
    """Values of a section of column names that are not its defaults."""
    values, defaults = dict(columns), {name: field.default for name, field in type(columns).model_fields.items()}
    return frozenset(name for key, name in values.items() if isinstance(name, str) and name != defaults[key])


def require_different_columns(names: Mapping[str, object]) -> None:
    """Raise ValueError if two keys name one column."""
    texts = {key: name for key, name in names.items() if isinstance(name, str)}
    for first, second in combinations(texts, 2):
        if texts[first] == texts[second]:
            raise ValueError(f"{first} and {second} name one column, {texts[first]!r}, and must name two")


class ColumnConfig(Section):
    """Column names of the input rows."""

    question: str = "question"
    """Column of the question."""
    solution: str = "solution"
    """Column of the whole solution text."""
    reasoning_trace: str = "reasoning_trace"
    """Column of an existing explanation; optional."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    conversations: str = "conversations"
    """Column of chat messages as in Bespoke-Stratos, read where the question column is absent."""

    @property
    def named(self) -> frozenset[str]:
        """Columns that the user named: they must exist, while those of the defaults may be absent."""
        return named_columns(self)

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        require_different_columns(dict(self))
        return self


class PrepareConfig(CommandConfig):
    """Turn rows (JSONL, Parquet, Hugging Face data set) into validated webdataset shards."""

    input: tuple[str, ...]
    """JSONL or Parquet files, or one `hf://name[:split]` data set of the Hugging Face hub."""
    output_dir: FilePath
    """Folder for the shards; it must not hold another data set."""
    columns: ColumnConfig = ColumnConfig()
    """Column names."""
    rows_per_shard: PositiveInt = 1000
    """Rows per shard."""
    max_characters: PositiveInt = 400_000
    """Longest question, solution or trace in characters; a longer row is rejected by its id."""
    max_rejected_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest accepted share of rejected rows; above it nothing is written. 1.0 accepts any share below all."""

    @field_validator("input", mode="after")
    @classmethod
    def _expand_home_of_input(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(with_home(source) for source in value)

    def path_faults(self) -> list[str]:
        faults = folder_faults("output_dir", self.output_dir)
        if not self.input:
            faults.append("input: is empty; name at least one .jsonl or .parquet file, or one hf://name[:split]")
        hub = [source for source in self.input if source.startswith(HUB)]
        if hub and len(self.input) > 1:
            faults.append(f"input: {hub[0]} must be the only input; prepare it and the files one by one")
        elif hub and find_spec("datasets") is None:
            faults.append(f"input: {hub[0]} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
        for source in self.input:
            if not source.startswith(HUB):
                faults += row_file_faults("input", Path(source))
        return faults
