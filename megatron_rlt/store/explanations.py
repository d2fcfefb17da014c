"""Files of explanations with their rewards, null where unknown, and the settings of the rewards. One rank writes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.given_files import reason_of
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.store.explanation_row import SETTINGS_KEY, VERSION, StoredExplanation, explanation_schema
from megatron_rlt.store.parts import COLUMNS_VERSION, PartStore, table_of, write_parquet
from megatron_rlt.types import ScoredExplanation
from megatron_rlt.whole_files import make_folder

_ROWS_AT_ONCE = 256


def explanation_store(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    terms: Sequence[str],
    reward: RewardConfig | None,
    output: Path | None,
    key: str,
) -> PartStore:
    """A store of explanations part by part. Args: as `explanation_schema` and `PartStore`."""
    identity = {**identity, COLUMNS_VERSION: VERSION}
    return PartStore(folder, explanation_schema(terms, reward), identity, output=output, key=key)


class CompletionStore:
    """The completions of a training run: one file per step, `step-NNNNNN.parquet`."""

    def __init__(self, folder: Path, *, terms: Sequence[str], reward: RewardConfig, is_writer: bool) -> None:
        """`is_writer`: without it every call does nothing."""
        self._folder, self._is_writer = folder, is_writer
        self._schema = explanation_schema(terms, reward)

    def write_step(self, step: int, completions: Sequence[ScoredExplanation]) -> None:
        """Write the file of a step, counted from 1; a step that is done again replaces its file."""
        if self._is_writer:
            make_folder(self._folder)
            rows = [StoredExplanation.of_step(step, one).cells() for one in completions]
            file = self._folder / f"step-{step:06d}.parquet"
            write_parquet(file, [table_of(rows, self._schema)], self._schema)


def reward_settings(file: Path) -> RewardConfig | None:
    """Settings of the rewards in a file, or None; ValueError for a file of an earlier version, or of something else."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no readable Parquet file; give one of score, collect or train") from error
    metadata = schema.metadata or {}
    with _naming(file):
        settings = json.loads(metadata.get(SETTINGS_KEY, b"{}"))
        if settings.get("version") == VERSION:
            return None if settings["reward"] is None else RewardConfig.model_validate(settings["reward"])
    if "student_solution_logprobs" in schema.names:  # in all versions
        raise ValueError(
            f"{file} was written by another version of megatron_rlt, with other columns; read it with that version, or"
            " make it again"
        )
    raise ValueError(f"{file} was not written by score, collect or train; give a file of theirs")


def read_explanations(file: Path, *, with_tokens: bool) -> Iterator[StoredExplanation]:
    """The rows of a file in order; `with_tokens` adds ids and log-probs, most of it. Raises as `reward_settings`."""
    reward_settings(file)
    with _naming(file), pq.ParquetFile(file) as parquet:
        _require_columns(parquet.schema_arrow)
        columns = [field.name for field in parquet.schema_arrow if with_tokens or _dtype(field.type) is None]
        for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            yield from _rows(batch)


def _require_columns(found: pa.Schema) -> None:
    """Raise ValueError for a column that is missing, or of another type than this version writes."""
    for column in explanation_schema((), None):
        place = found.get_field_index(column.name)
        if place < 0:
            raise ValueError(f"column {column.name!r} is missing")
        if _content(found.field(place).type) != _content(column.type):
            raise ValueError(f"column {column.name!r} holds {found.field(place).type} instead of {column.type}")


def _content(column: pa.DataType) -> tuple[str, pa.DataType]:
    """A type without the name that a file's writer gives to the items of a list."""
    return ("list", column.value_type) if pa.types.is_list(column) else ("one", column)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Re-raise what a damaged or changed file makes of reading it as a ValueError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged or was changed ({type(error).__name__}: {reason_of(error)}); copy or make it again"
        ) from error


@dataclass(frozen=True)
class ExplanationSummary:
    """What a person wants to know of a finished file."""

    num_questions: int
    num_explanations: int
    means: dict[str, float]  # over the rows that have a finite value; nan where none has
    dropped: Counter[str]
    flags: Counter[str]
    num_well_formed: int


def summarize_explanations(file: Path, columns: Sequence[str]) -> ExplanationSummary:
    """Count, and average some columns."""
    table = pq.read_table(file, columns=["question_index", "flags", "dropped", *columns])
    flags = table["flags"].to_pylist()
    means = {name: Tally.of(filter(math.isfinite, table[name].drop_null().to_pylist())).mean for name in columns}
    return ExplanationSummary(
        num_questions=len(pc.unique(table["question_index"])),
        num_explanations=table.num_rows,
        means=means,
        dropped=Counter(table["dropped"].drop_null().to_pylist()),
        flags=Counter(flag for row in flags for flag in row),
        num_well_formed=sum(not row for row in flags),
    )


_DTYPES = {pa.int64(): torch.int64, pa.float32(): torch.float32}


def _dtype(column: pa.DataType) -> torch.dtype | None:
    """Of a column of token ids or log-probs; None for any other."""
    return _DTYPES.get(column.value_type) if pa.types.is_list(column) else None


def _rows(batch: pa.RecordBatch) -> Iterator[StoredExplanation]:
    """Lists of tokens become tensors without a Python object for every number."""
    tokens = {field.name: dtype for field in batch.schema if (dtype := _dtype(field.type)) is not None}
    plain = batch.select([name for name in batch.schema.names if name not in tokens]).to_pylist()
    for index, cells in enumerate(plain):
        tensors = {name: _tensor(batch[name][index], dtype) for name, dtype in tokens.items()}
        yield StoredExplanation.from_cells(cells | tensors)


def _tensor(cell: pa.ListScalar, dtype: torch.dtype) -> Tensor | None:
    return torch.tensor(cell.values.to_numpy(zero_copy_only=False), dtype=dtype) if cell.is_valid else None
