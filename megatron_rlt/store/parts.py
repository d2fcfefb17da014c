"""Rows that come in parts, on disk: each part is a Parquet file that is there whole or not at all.

In: rows by column name, part by part, and the identity of what was asked. Out: `FOLDER/part-NNNNNN.parquet`, which a
run that was killed continues after; and one file of all of them. Folder and file carry the identity, so that rows of
two different runs never meet. Only one rank calls. What the columns mean is the caller's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.store.run_folder import describe_changes

_IDENTITY_FILE, _IDENTITY_KEY = "identity.json", b"megatron_rlt.identity"


class PartStore:
    """One folder of parts."""

    def __init__(self, folder: Path, schema: pa.Schema, identity: Mapping[str, Any]) -> None:
        """`identity`: JSON values by name; a folder with another one is refused."""
        self.folder = folder
        self._schema = schema
        self._identity = json.loads(json.dumps(identity))  # as it reads back

    def check(self) -> None:
        """Raise ValueError unless the folder is free for these rows or holds some of them; changes nothing."""
        file = self.folder / _IDENTITY_FILE
        if file.is_file():
            held = json.loads(file.read_text(encoding="utf-8"))
        elif any(self.folder.glob("part-*.parquet")):
            held = {}
        else:
            return
        _require_equal(self.folder, held, self._identity)

    def begin(self) -> int:
        """Make the folder, or find it; returns the number of complete parts from the first on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / _IDENTITY_FILE
        if not file.is_file():
            temporary = file.with_name(f".{_IDENTITY_FILE}.tmp")
            temporary.write_text(json.dumps(self._identity, indent=2), encoding="utf-8")
            temporary.replace(file)
        number = 0
        while _is_whole(self.part(number)):
            number += 1
        return number

    def write(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part, whole or not at all; one that is there is replaced."""
        write_parquet(self.part(number), [table_of(rows, self._schema)], self._schema)

    def write_table(self, number: int, table: pa.Table) -> None:
        """As `write`, for rows that are a table already."""
        write_parquet(self.part(number), [table], self._schema)

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a complete part."""
        return pq.read_table(self.part(number), columns=None if columns is None else list(columns))

    def join(self, output: Path, num_parts: int) -> None:
        """Write all parts into one file, a row group or more a part. The parts stay: see `remove`."""
        metadata = {_IDENTITY_KEY: json.dumps(self._identity)}
        tables = (self.read(number).replace_schema_metadata(metadata) for number in range(num_parts))
        write_parquet(output, tables, self._schema.with_metadata(metadata))

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"


def holds_rows_of(output: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a joined file is there.

    Raises:
        ValueError: it is there, but was made by another run or is no such file.
    """
    if not output.exists():
        return False
    try:
        metadata = pq.read_schema(output).metadata or {}
    except (pa.ArrowException, OSError):
        metadata = {}
    held = json.loads(metadata.get(_IDENTITY_KEY, "{}"))
    _require_equal(output, held, json.loads(json.dumps(identity)))
    return True


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows by column name as a table; every column must be in every row."""
    columns = [pa.array([row[column.name] for row in rows], type=column.type) for column in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _require_equal(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if not held:
        raise ValueError(f"output_dir: {path} exists and was not written by this command; choose another output_dir")
    changes = describe_changes(held, wanted)
    if changes:
        raise ValueError(
            f"output_dir: {path} holds rows of another run: {changes}. Nothing is overwritten: put the values back, or "
            "choose another output_dir"
        )


def _is_whole(part: Path) -> bool:
    """A part appears by renaming, so one that is there is whole; one that is damaged all the same is done again."""
    try:
        pq.read_metadata(part)
    except (pa.ArrowException, OSError):
        return False
    return True
