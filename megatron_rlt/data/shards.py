"""Data set on disk: webdataset tar shards for megatron-energon (one `<key>.json` per row) and `manifest.json`.

Equal rows give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_rlt.types import Problem

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class Shard(BaseModel):
    """One tar file of the data set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


class Manifest(BaseModel):
    """Contents and sources of a folder of shards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    num_rows: int
    num_rejected: int
    rejected_by_reason: dict[str, int]
    content_hash: str  # SHA-256 over the shards' hashes
    source_hash: str  # SHA-256 over the sources' bytes and the settings that shape the rows
    sources: tuple[str, ...]
    shards: tuple[Shard, ...]


def write_shards(folder: Path, problems: Iterable[Problem], *, rows_per_shard: int) -> tuple[Shard, ...]:
    """Write all problems into tar files of `rows_per_shard` rows each."""
    shards: list[Shard] = []
    remaining = iter(problems)
    while part := list(islice(remaining, rows_per_shard)):
        data = folder / _shard_name(len(shards))
        _write_tar(data, part, first_key=len(shards) * rows_per_shard)
        with data.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append(Shard(name=data.name, num_rows=len(part), num_bytes=data.stat().st_size, sha256=digest))
    return tuple(shards)


def content_hash(shards: Iterable[Shard]) -> str:
    """SHA-256 over the hashes of all shards in order."""
    return hashlib.sha256("\n".join(shard.sha256 for shard in shards).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check shard sizes.

    Raises ValueError if `prepare` did not write the folder, or a shard is missing or has another size.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no prepared data set ({MANIFEST_FILE} is missing): run megatron-rlt prepare")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ValueError(
            f"{path} is no manifest of a prepared data set: {where}: {fault['msg']}; prepare the data again"
        ) from error
    if contradiction := _contradiction(manifest):
        raise ValueError(f"{path} is no manifest of a prepared data set: {contradiction}; prepare the data again")
    if manifest.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {manifest.format_version}, this version reads {FORMAT_VERSION}: "
            "prepare the data again"
        )
    for shard in manifest.shards:
        data = folder / shard.name
        size = data.stat().st_size if data.is_file() else None
        if size != shard.num_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{data} {found}, {shard.num_bytes} were written: copy or prepare the data set again")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What in a manifest cannot be as `prepare` writes it."""
    names = [_shard_name(number) for number in range(len(manifest.shards))]
    if [shard.name for shard in manifest.shards] != names:
        return "its shards must be named " + (", ".join(names[:2]) + ", ..." if names else "...")
    if sum(shard.num_rows for shard in manifest.shards) != manifest.num_rows or manifest.num_rows < 1:
        return f"its shards hold not the {manifest.num_rows} rows that it states"
    if content_hash(manifest.shards) != manifest.content_hash:
        return "its content_hash is not that of its shards"
    return None


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def problem_to_json(problem: Problem) -> bytes:
    """Encode one row of a shard."""
    row = {"id": problem.problem_id, "question": problem.question, "solution": problem.solution}
    if problem.reasoning_trace is not None:
        row["reasoning_trace"] = problem.reasoning_trace
    return json.dumps(row, ensure_ascii=False).encode("utf-8")


def problem_from_json(data: bytes) -> Problem:
    """Decode one row of a shard."""
    row = json.loads(data)
    return Problem(row["id"], row["question"], row["solution"], row.get("reasoning_trace"))


def _write_tar(path: Path, problems: list[Problem], *, first_key: int) -> None:
    """Keep TarInfo's fixed defaults for time, owner and mode, so that the bytes depend on the rows alone."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, problem in enumerate(problems, start=first_key):
            data = problem_to_json(problem)
            member = tarfile.TarInfo(f"{key:09d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
