"""Writes energon's index of a folder of shards: `.nv-meta` and one `.idx` file beside each tar.

It calls the internals of energon's `prepare` in this process: the public entry point forks workers, which is unsafe in
a rank with communication threads and forbidden in a daemonic process.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path

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

SPLIT = "train"  # the only split: held-out rows are a data set of their own
DATASET_FILE = "dataset.yaml"
MAX_PARTS = 1  # a row has one part, `json`


def write_energon_index(folder: Path, num_rows_by_shard: Mapping[str, int], *, content_hash: str) -> None:
    """Index the shards (file name -> rows, in order) of `folder`, so that energon opens it as a CrudeWebdataset."""
    names = list(num_rows_by_shard)
    meta = folder / MAIN_FOLDER_NAME
    meta.mkdir()
    _index_samples(folder, names)
    info = {"energon_version": energon_version, "shard_counts": dict(num_rows_by_shard)}
    (meta / INFO_JSON_FILENAME).write_text(json.dumps(info, indent=2))
    splits = {"split_parts": {SPLIT: names}, "exclude": []}
    (meta / SPLIT_YAML_FILENAME).write_text(yaml.safe_dump(splits, sort_keys=False))
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (meta / DATASET_FILE).write_text(yaml.safe_dump(dataset, sort_keys=False))
    # Energon would draw a random id and cache under it; an id made from the content keeps equal data equal.
    (meta / INDEX_UUID_FILENAME).write_text(str(uuid.uuid5(uuid.NAMESPACE_OID, content_hash)))


def _index_samples(folder: Path, names: list[str]) -> None:
    """Write the `.idx` files (offsets of the rows, for sequential reading) and the SQLite index (by key)."""
    root = EPath(folder)
    index = SqliteIndexWriterAggregator(root / MAIN_FOLDER_NAME / INDEX_SQLITE_FILENAME, total_tasks=len(names))
    index.on_start(None)
    numbers = {name: number for number, name in enumerate(names)}
    for name in names:
        entries = BaseWebdatasetFactory._preprocess_tar(name, numbers, root, MAX_PARTS)
        index.on_item(list(entries), None)
    index.on_finish(None)
