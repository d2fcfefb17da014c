"""Writes energon's index of a folder of shards: `.nv-meta` and one `.idx` file beside each tar.

It calls the internals of energon's `prepare` in this process: the public entry point forks workers, which is unsafe in
a rank with communication threads and forbidden in a daemonic process.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import uuid
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from megatron.energon import BaseWebdatasetFactory
from megatron.energon import __version__ as energon_version
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import (
    INDEX_SQLITE_FILENAME,
    INDEX_UUID_FILENAME,
    INFO_JSON_FILENAME,
    MAIN_FOLDER_NAME,
    SPLIT_YAML_FILENAME,
)
from megatron.energon.flavors.webdataset.prepare import SqliteIndexWriterAggregator

from megatron_rlt.disk_faults import free_bytes, writing

SPLIT = "train"  # the only split: held-out rows are a data set of their own
DATASET_FILE = "dataset.yaml"
MAX_PARTS = 1  # a row has one part, `json`
_PAGE = 4096  # of SQLite's files
_SQLITE_VERSION = slice(96, 100)  # bytes of the file's head: which version of the library wrote it


def write_energon_index(folder: Path, num_rows_by_shard: Mapping[str, int], *, content_hash: str) -> None:
    """Index the shards (file name -> rows, in order) of `folder`, so that energon opens it as a CrudeWebdataset."""
    meta = folder / MAIN_FOLDER_NAME
    meta.mkdir()
    _index_samples(folder, list(num_rows_by_shard))
    for name, text in _texts(num_rows_by_shard, content_hash).items():
        (meta / name).write_text(text)


def check_energon_texts(folder: Path, num_rows_by_shard: Mapping[str, int], *, content_hash: str) -> None:
    """Raise ValueError unless what energon is told about the shards is, byte for byte, what is written here.

    Energon imports and calls what `dataset.yaml` names: a folder that came from elsewhere could run any code.
    """
    meta, texts = folder / MAIN_FOLDER_NAME, _texts(num_rows_by_shard, content_hash)
    found = {path.name for path in meta.iterdir()} if meta.is_dir() else set()
    if found != texts.keys() | {INDEX_SQLITE_FILENAME}:
        strange = sorted(found ^ (texts.keys() | {INDEX_SQLITE_FILENAME}))
        raise _not_as_written(meta, f"{', '.join(map(repr, strange))} is missing or not of it")
    for name, text in texts.items():
        if not (meta / name).is_file() or (meta / name).read_bytes() != text.encode():
            raise _not_as_written(meta / name, "has another content")


def check_energon_index(folder: Path, num_rows_by_shard: Mapping[str, int]) -> None:
    """Raise ValueError unless the offsets of the rows are those of the shards; reads the head of every row."""
    names = list(num_rows_by_shard)
    with TemporaryDirectory(prefix="megatron-rlt-") as made:
        again = Path(made)
        with writing(again):
            (again / MAIN_FOLDER_NAME).mkdir()
            for name in names:
                (again / name).symlink_to((folder / name).resolve())
            _index_samples(again, names)
        for path in (*(f"{name}.idx" for name in names), f"{MAIN_FOLDER_NAME}/{INDEX_SQLITE_FILENAME}"):
            held = folder / path
            if not held.is_file() or _content(held) != _content(again / path):
                raise _not_as_written(held, "is not the index of these shards")


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name != INDEX_SQLITE_FILENAME:
        return content
    return content[: _SQLITE_VERSION.start] + content[_SQLITE_VERSION.stop :]


def _not_as_written(path: Path, fault: str) -> ValueError:
    return ValueError(
        f"{path} must be as this version of `megatron-rlt prepare` writes it, but {fault}: nothing was read; prepare"
        " the data again, from its source"
    )


def _texts(num_rows_by_shard: Mapping[str, int], content_hash: str) -> dict[str, str]:
    """The text files of energon's index, by name."""
    info = {"energon_version": energon_version, "shard_counts": dict(num_rows_by_shard)}
    splits = {"split_parts": {SPLIT: list(num_rows_by_shard)}, "exclude": []}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    return {
        INFO_JSON_FILENAME: json.dumps(info, indent=2),
        SPLIT_YAML_FILENAME: yaml.safe_dump(splits, sort_keys=False),
        DATASET_FILE: yaml.safe_dump(dataset, sort_keys=False),
        # Energon would draw a random id and cache under it; an id made from the content keeps equal data equal.
        INDEX_UUID_FILENAME: str(uuid.uuid5(uuid.NAMESPACE_OID, content_hash)),
    }


def _index_samples(folder: Path, names: list[str]) -> None:
    """Write the `.idx` files (offsets of the rows, for sequential reading) and the SQLite index (by key)."""
    root = EPath(folder)
    try:
        index = SqliteIndexWriterAggregator(root / MAIN_FOLDER_NAME / INDEX_SQLITE_FILENAME, total_tasks=len(names))
        index.on_start(None)
        numbers = {name: number for number, name in enumerate(names)}
        for name in names:
            entries = BaseWebdatasetFactory._preprocess_tar(name, numbers, root, MAX_PARTS)
            index.on_item(list(entries), None)
        index.on_finish(None)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_IOERR_WRITE):
            raise
        is_full = error.sqlite_errorcode == sqlite3.SQLITE_FULL or free_bytes(folder) < _PAGE
        reason = errno.ENOSPC if is_full else errno.EIO  # SQLite keeps no other
        raise OSError(reason, os.strerror(reason)) from error
