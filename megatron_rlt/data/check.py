"""Checks a folder of shards before a row of it is used: every file must be what `prepare` wrote.

The hashes of the manifest find damage; the index of energon is made again and compared, because a folder that came from
elsewhere brings a manifest of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_rlt.data.energon_index import check_energon_index, check_energon_texts
from megatron_rlt.data.shards import Manifest, read_manifest


def check_data_set(folder: Path) -> Manifest:
    """Read every byte of a folder of shards. Raises ValueError, naming the file, unless `prepare` wrote all of it."""
    manifest = read_manifest(folder)
    rows = num_rows_by_shard(manifest)
    check_energon_texts(folder, rows, content_hash=manifest.content_hash)
    for shard in manifest.shards:
        with (folder / shard.name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                raise ValueError(
                    f"{folder / shard.name} was altered since it was prepared (its SHA-256 is not that of"
                    " manifest.json): copy or prepare the data set again"
                )
    check_energon_index(folder, rows)
    return manifest


def check_openable(folder: Path) -> Manifest:
    """Read the manifest, and what energon acts upon when it opens the folder. Raises ValueError as `check_data_set`."""
    manifest = read_manifest(folder)
    check_energon_texts(folder, num_rows_by_shard(manifest), content_hash=manifest.content_hash)
    return manifest


def num_rows_by_shard(manifest: Manifest) -> dict[str, int]:
    return {shard.name: shard.num_rows for shard in manifest.shards}
