"""Reading source rows: JSONL, Parquet and Hugging Face hub data sets, streamed one row at a time.

In: the entries of `prepare`'s `input`. Out: `SourceRow` with the raw values of the columns, or `RejectedRow` where
a row cannot be read at all (not UTF-8, not JSON). Faults of a whole source (no such file, unknown suffix, columns
that do not exist) raise ValueError. What the values must be is left to `validation`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.config.jobs import ColumnConfig
from megatron_rlt.data.rejection import RejectedRow, RejectReason

HUB_PREFIX = "hf://"
DEFAULT_SPLIT = "train"  # of `hf://name` without a split; what the hub calls a data set's main part
SUFFIXES = (".jsonl", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256  # reasoning traces reach 100 kB, so a batch stays near 25 MB


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in its source."""

    file: str
    row: int  # 1-based; lines of a JSONL file, blank ones included
    values: Mapping[str, object]


def read_rows(source: str, columns: ColumnConfig) -> Iterator[SourceRow | RejectedRow]:
    """Every row of one source in its order. Raises ValueError for a source that `check_source` refuses."""
    check_source(source, columns)
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, columns)
    if source.endswith(".jsonl"):
        return _read_jsonl(source)
    return _read_parquet(source, columns)


def check_source(source: str, columns: ColumnConfig) -> None:
    """Raise ValueError for a source that cannot be read, before any of its rows is.

    No such file, unknown suffix, no Parquet file, columns it lacks; for the hub: `datasets` not installed.
    """
    if source.startswith(HUB_PREFIX):
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"input {source!r} needs the package `datasets`, which is not installed: "
                "pip install 'megatron-rlt[hub]'"
            )
        _hub_name_and_split(source)
        return
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"input file {source!r} {what}: give the path of a JSONL or Parquet file")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"input {source!r} has the unknown suffix {path.suffix!r}: give a file that ends in "
            f"{' or '.join(SUFFIXES)}, or {HUB_PREFIX}name[:split]"
        )
    if path.suffix == ".parquet":
        with _readable_parquet(source), pq.ParquetFile(source) as file:
            _wanted_columns(source, file.schema_arrow.names, columns)


def source_digest(source: str) -> str:
    """SHA-256 of a file's bytes; of the name alone for a hub data set, whose content is known only when read."""
    if source.startswith(HUB_PREFIX):
        return hashlib.sha256(source.encode()).hexdigest()
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_jsonl(source: str) -> Iterator[SourceRow | RejectedRow]:
    with Path(source).open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse_line(source, number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)


def _parse_line(source: str, number: int, line: bytes) -> SourceRow | RejectedRow:
    """Decode by line, so that one bad byte costs one row and not the file."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line: {error.reason}"
        return RejectedRow(source, number, RejectReason.NOT_UTF8, None, detail)
    if not text.strip():
        return RejectedRow(source, number, RejectReason.EMPTY, None, "blank line")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        return RejectedRow(source, number, RejectReason.NOT_JSON, None, str(error))
    if not isinstance(values, dict):
        detail = f"a JSON {type(values).__name__} instead of an object"
        return RejectedRow(source, number, RejectReason.NOT_AN_OBJECT, None, detail)
    return SourceRow(source, number, values)


def _read_parquet(source: str, columns: ColumnConfig) -> Iterator[SourceRow | RejectedRow]:
    number = 0
    with _readable_parquet(source), pq.ParquetFile(source) as file:
        wanted = _wanted_columns(source, file.schema_arrow.names, columns)
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted):
            for index in range(batch.num_rows):
                number += 1
                yield _parquet_row(source, number, batch, index)


@contextmanager
def _readable_parquet(source: str) -> Iterator[None]:
    """Turn Arrow's complaint about a damaged file into one that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"input file {source!r} is no readable Parquet file: {error}; write it again") from error


def _parquet_row(source: str, number: int, batch: pa.RecordBatch, index: int) -> SourceRow | RejectedRow:
    """One row, cell by cell: Arrow does not check text, and a bad byte must cost this row only."""
    values: dict[str, object] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return RejectedRow(source, number, RejectReason.NOT_UTF8, name, f"byte {error.start}: {error.reason}")
    return SourceRow(source, number, values)


def _read_hub(source: str, columns: ColumnConfig) -> Iterator[SourceRow | RejectedRow]:
    from datasets import load_dataset  # optional package; check_source has seen that it is there

    name, split = _hub_name_and_split(source)
    try:
        rows = load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # not found, no network, no such split
        raise ValueError(f"input {source!r} cannot be loaded: {error}; check name, split and network") from error
    if rows.column_names is not None:
        rows = rows.select_columns(_wanted_columns(source, rows.column_names, columns))
    for number, values in enumerate(rows, start=1):
        yield SourceRow(source, number, values)


def _hub_name_and_split(source: str) -> tuple[str, str]:
    name, colon, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not name or (colon and not split):
        raise ValueError(f"input {source!r} names no data set or no split: write {HUB_PREFIX}name[:split]")
    return name, split or DEFAULT_SPLIT


def _wanted_columns(source: str, present: list[str], columns: ColumnConfig) -> list[str]:
    """The columns to read of those present; ValueError where neither kind of row can be made of them."""
    if not {columns.question, columns.solution} <= set(present) and columns.conversations not in present:
        raise ValueError(
            f"input {source!r} has the columns {sorted(present)}: it needs {columns.question!r} and "
            f"{columns.solution!r}, or {columns.conversations!r}; name yours under `columns`"
        )
    wanted = {columns.question, columns.solution, columns.reasoning_trace, columns.problem_id, columns.conversations}
    return [name for name in present if name in wanted]
