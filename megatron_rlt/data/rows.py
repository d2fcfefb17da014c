"""Reads source rows from JSONL, Parquet and Hugging Face hub data sets, streamed one row at a time.

Yields a `SourceRow` with raw column values, or a `RejectedRow` for a row that cannot be read (not UTF-8, not JSON).
Problems with a whole source (no such file, unknown suffix, missing columns) raise ValueError.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError

T = TypeVar("T")
HUB_PREFIX = "hf://"
DEFAULT_SPLIT = "train"  # used for `hf://name` without a split
SUFFIXES = (".jsonl", ".parquet")
SelectColumns = Callable[[list[str]], list[str]]
"""Picks the columns to read from those of a Parquet or hub source; raises ValueError if a needed one is missing."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256  # reasoning traces reach 100 kB, so a batch stays near 25 MB


@dataclass(frozen=True)
class SourceRow:
    """One row with its raw values."""

    file: str
    row: int  # 1-based; lines of a JSONL file, blank ones included
    values: Mapping[str, object]


def read_rows(source: str, columns: ColumnConfig) -> Iterator[SourceRow | RejectedRow]:
    """Read every row of one source in order. Raises ValueError as `check_source` does."""
    return read_columns(source, partial(_wanted_columns, source, columns), streaming=True)


def read_columns(source: str, select: SelectColumns, *, streaming: bool) -> Iterator[SourceRow | RejectedRow]:
    """Read every row of one source in order, with the columns that `select` picks.

    `streaming` fetches the rows of a hub data set as they are read and caches nothing; False downloads the whole data
    set into the hub's disk cache first. Raises ValueError as `check_source` and `select` do.
    """
    _check_source(source, select)
    if source.startswith(HUB_PREFIX):
        return _read_hub(source, select, streaming=streaming)
    if source.endswith(".jsonl"):
        return _read_jsonl(source)
    return _read_parquet(source, select)


def convert_rows(
    rows: Iterable[SourceRow | RejectedRow], convert: Callable[[SourceRow], T]
) -> Iterator[T | RejectedRow]:
    """Convert each readable row; a row for which `convert` raises UnusableRowError becomes a `RejectedRow`."""
    for row in rows:
        try:
            yield row if isinstance(row, RejectedRow) else convert(row)
        except UnusableRowError as error:
            yield error.rejected(row.file, row.row)


def check_source(source: str, columns: ColumnConfig) -> None:
    """Raise ValueError for a source that cannot be read, before reading any of its rows.

    Reasons: no such file, unknown suffix, not a Parquet file, missing columns, hub package `datasets` not installed.
    """
    _check_source(source, partial(_wanted_columns, source, columns))


def _check_source(source: str, select: SelectColumns) -> None:
    if source.startswith(HUB_PREFIX):
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"input {source!r} needs the package `datasets`, which is not installed: "
                "pip install 'megatron-rlt[hub]'"
            )
        _hub_address(source)
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
            select(file.schema_arrow.names)


def source_digest(source: str) -> str:
    """SHA-256 of a file's bytes; for a hub data set, of its name alone (its content is unknown until read)."""
    if source.startswith(HUB_PREFIX):
        return hashlib.sha256(source.encode()).hexdigest()
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_jsonl(source: str) -> Iterator[SourceRow | RejectedRow]:
    with Path(source).open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse_line(source, number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)


def _parse_line(source: str, number: int, line: bytes) -> SourceRow | RejectedRow:
    """Decode line by line, so that one bad byte costs one row and not the file."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line: {error.reason}"
        return RejectedRow(source, number, RejectReason.NOT_UTF8, None, detail)
    if not text.strip():
        return RejectedRow(source, number, RejectReason.EMPTY, None, "blank line")
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except UnusableRowError as error:
        return error.rejected(source, number)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        return RejectedRow(source, number, RejectReason.NOT_JSON, None, str(error))
    if not isinstance(values, dict):
        detail = f"a JSON {type(values).__name__} instead of an object"
        return RejectedRow(source, number, RejectReason.NOT_AN_OBJECT, None, detail)
    return SourceRow(source, number, values)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; one in which a key stands twice is ambiguous, and Python would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise UnusableRowError(RejectReason.AMBIGUOUS, twice, "the key stands twice in one object")
    return values


def require_named(
    rows: Iterable[SourceRow | RejectedRow], named: Collection[str], where: str
) -> Iterator[SourceRow | RejectedRow]:
    """The rows; raises ValueError behind the last if no readable row has a column that the user named."""
    missing, present = set(named), dict[str, None]()
    for row in rows:
        if isinstance(row, SourceRow):
            missing.difference_update(row.values)
            present |= dict.fromkeys(row.values) if missing else {}
        yield row
    if missing and present:
        raise ValueError(
            f"{where}: no row has the column {', '.join(map(repr, sorted(missing)))} that `columns` names; correct the"
            f" name, the rows have {', '.join(sorted(present))}"
        )


def _read_parquet(source: str, select: SelectColumns) -> Iterator[SourceRow | RejectedRow]:
    with _readable_parquet(source), pq.ParquetFile(source) as file:
        batches = file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=select(file.schema_arrow.names))
        cells = ((batch, index) for batch in batches for index in range(batch.num_rows))
        for number, (batch, index) in enumerate(cells, start=1):
            yield _parquet_row(source, number, batch, index)


@contextmanager
def _readable_parquet(source: str) -> Iterator[None]:
    """Re-raise Arrow's error for a damaged file as a ValueError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"input file {source!r} is no readable Parquet file: {error}; write it again") from error


def _parquet_row(source: str, number: int, batch: pa.RecordBatch, index: int) -> SourceRow | RejectedRow:
    """Convert one row cell by cell: Arrow does not validate text, and a bad byte must reject this row only."""
    values: dict[str, object] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return RejectedRow(source, number, RejectReason.NOT_UTF8, name, f"byte {error.start}: {error.reason}")
    return SourceRow(source, number, values)


def _read_hub(source: str, select: SelectColumns, *, streaming: bool) -> Iterator[SourceRow | RejectedRow]:
    rows = _open_hub(source, streaming=streaming)
    if rows.column_names is not None:
        rows = rows.select_columns(select(rows.column_names))
    for number, values in enumerate(rows, start=1):
        yield SourceRow(source, number, values)


def _open_hub(source: str, *, streaming: bool) -> Any:  # noqa: ANN401 - a data set of an optional, untyped package
    from datasets import load_dataset  # check_source has seen that it is there

    name, configuration, split = _hub_address(source)
    try:
        return load_dataset(name, configuration, split=split, streaming=streaming)
    except (OSError, ValueError) as error:  # not found, not allowed, no network, no such split
        again = "" if streaming else "; a set fetched once with network is found again without"
        raise ValueError(f"input {source!r} cannot be loaded: {error}; check name, split and network{again}") from error


def _hub_address(source: str) -> tuple[str, str | None, str]:
    """Name, configuration (None: the only one) and split of `hf://owner/name[/configuration][:split]`."""
    address, colon, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not address or (colon and not split):
        raise ValueError(f"input {source!r} names no data set or no split: write {HUB_PREFIX}name[:split]")
    owner_and_name, slash, configuration = address.rpartition("/")
    if slash and owner_and_name.count("/") == 1 and not address.startswith("/"):
        return owner_and_name, configuration, split or DEFAULT_SPLIT
    return address, None, split or DEFAULT_SPLIT


def _wanted_columns(source: str, columns: ColumnConfig, present: list[str]) -> list[str]:
    """Columns to read; raises ValueError if they form neither kind of row."""
    if not {columns.question, columns.solution} <= set(present) and columns.conversations not in present:
        raise ValueError(
            f"input {source!r} has the columns {sorted(present)}: it needs {columns.question!r} and "
            f"{columns.solution!r}, or {columns.conversations!r}; name yours under `columns`"
        )
    if lost := sorted(columns.named - set(present)):
        raise ValueError(
            f"input {source!r} lacks the column {', '.join(map(repr, lost))} that `columns` names, and has"
            f" {sorted(present)}; correct the name"
        )
    wanted = {columns.question, columns.solution, columns.reasoning_trace, columns.problem_id, columns.conversations}
    return [name for name in present if name in wanted]
