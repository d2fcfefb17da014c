"""Rows that come in parts, on disk: each part is a Parquet file that is there whole or not at all.

A run that was killed continues after its last part; one file joins them. Folder and files carry the identity of what
was asked, so that rows of two different runs never meet. Only one rank writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.disk_faults import writing
from megatron_rlt.given_files import read_json_object
from megatron_rlt.store.run_folder import describe_changes
from megatron_rlt.whole_files import (
    discard,
    flush_to_disk,
    make_folder,
    replacing,
    sweep_beside,
    temporary_beside,
    write_text,
)

_IDENTITY_FILE, _IDENTITY_KEY = "identity.json", b"megatron_rlt.identity"
_EARLIER_KEY = b"megatron_rlt.score"  # of the identity in files of earlier versions

COLUMNS_VERSION = "version of the columns"
"""Name in the identity of rows whose columns were others in earlier versions."""


_TYPES = {
    "str": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "FinishReason": pa.string(),
    "tuple[FormatFlag, ...]": pa.list_(pa.string()),
    "Mapping[str, float]": pa.map_(pa.string(), pa.float64()),
    "ids": pa.list_(pa.int64()),
    "Tensor": pa.list_(pa.float32()),
}


class PartStore:
    """One folder of parts, and the file that they become."""

    def __init__(
        self, folder: Path, schema: pa.Schema, identity: Mapping[str, Any], *, output: Path | None, key: str
    ) -> None:
        """
        Args:
            identity: JSON values by name; a folder or an output with another one is refused.
            output: file of all parts in the end; None: they stay parts.
            key: the configuration's key of the place, for errors.
        """
        self.folder, self.output, self._key = folder, output, key
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it reads back
        self._schema = schema.with_metadata((schema.metadata or {}) | {_IDENTITY_KEY: json.dumps(self._identity)})

    def is_finished(self) -> bool:
        """Whether the output is there already. Changes nothing.

        Raises ValueError if output or folder hold rows of another run or of an earlier version, or something else.
        """
        if self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            file, remedy = self.folder / _IDENTITY_FILE, f"remove {self.folder} to do its parts again"
            self._require_own(self.folder, read_json_object(file, remedy=remedy) if file.is_file() else {})
        if self.output is None or not self.output.exists():
            return False
        self._require_own(self.output, _identity_in(self.output))
        return True

    def begin(self) -> int:
        """Make the folder, or find it; returns the number of complete parts from the first on."""
        if not self.folder.is_dir():  # it has its identity before it has its name
            sweep_beside(self.folder)
            unnamed = temporary_beside(self.folder)
            try:
                make_folder(unnamed)
                self._write_identity(unnamed)
                with writing(self.folder):
                    unnamed.rename(self.folder)
                    flush_to_disk(self.folder.parent)
            finally:
                shutil.rmtree(unnamed, ignore_errors=True)  # there only where the disk refused
        elif not (self.folder / _IDENTITY_FILE).is_file():  # empty, see `is_finished`
            self._write_identity(self.folder)
        number = 0
        while _is_whole(self.part(number)):
            number += 1
        return number

    def write(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part, whole or not at all; one that is there is replaced."""
        write_parquet(self.part(number), [table_of(rows, self._schema)], self._schema)

    def read(self, number: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of a complete part, row by row."""
        rows: list[dict[str, Any]] = pq.read_table(self.part(number), columns=list(columns)).to_pylist()
        return rows

    def join(self, num_parts: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write all parts into the output, a row group or more per part. The parts stay: see `remove`.

        `columns`: values that take the place of a column's, over the rows of all parts.
        """
        assert self.output is not None, "these parts stay parts"
        write_parquet(self.output, self._joined(num_parts, columns), self._schema)

    def remove(self) -> None:
        """Remove the folder, if it is there; a kill leaves no part of it under its name."""
        if self.folder.is_dir():
            discard(self.folder)
        sweep_beside(self.folder)

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def _write_identity(self, folder: Path) -> None:
        write_text(folder / _IDENTITY_FILE, json.dumps(self._identity, indent=2))

    def _joined(self, num_parts: int, columns: Mapping[str, Sequence[Any]]) -> Iterable[pa.Table]:
        done = 0
        for number in range(num_parts):
            table = pq.read_table(self.part(number))
            for name, values in columns.items():
                index = self._schema.get_field_index(name)
                cells = pa.array(values[done : done + table.num_rows], type=self._schema.field(index).type)
                table = table.set_column(index, name, cells)
            done += table.num_rows
            yield table

    def _require_own(self, path: Path, held: Mapping[str, Any]) -> None:
        key = self._key
        if not held:
            raise ValueError(f"{key}: {path} exists and was not written by this command; choose another {key}")
        if held.get(COLUMNS_VERSION) != self._identity.get(COLUMNS_VERSION):
            raise ValueError(
                f"{key}: {path} was written by another version of megatron_rlt, with other columns; finish it with that"
                f" version, or choose another {key}"
            )
        if changes := describe_changes(held, self._identity):
            raise ValueError(
                f"{key}: {path} holds rows of another run: {changes}. Nothing is overwritten: put the values back, or"
                f" choose another {key}"
            )


def column_type(field: Field[Any]) -> pa.DataType:
    """The type of a column by the annotation of a record's field; columns of token ids are named `*_ids`."""
    return _TYPES["ids" if field.name.endswith("_ids") else str(field.type).removesuffix(" | None")]


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows by column name as a table; null where a row lacks a column."""
    columns = [pa.array([row.get(column.name) for row in rows], type=column.type) for column in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _identity_in(output: Path) -> dict[str, Any]:
    """Empty for a file that is not ours."""
    try:
        metadata = pq.read_schema(output).metadata or {}
        identity = json.loads(metadata.get(_IDENTITY_KEY, metadata.get(_EARLIER_KEY, b"{}")))
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return identity if isinstance(identity, dict) else {}


def _is_whole(part: Path) -> bool:
    """A part appears by renaming, so one that is there is whole; one that is damaged all the same is done again."""
    try:
        pq.read_metadata(part)
    except (pa.ArrowException, OSError):
        return False
    return True
