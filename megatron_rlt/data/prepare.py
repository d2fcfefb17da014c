"""Converts source files to a folder of validated shards plus `rejected.jsonl`, which lists every rejected row.

The folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TextIO

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.data.check import check_data_set
from megatron_rlt.data.energon_index import write_energon_index
from megatron_rlt.data.rejection import RejectedRow, UnusableRowError
from megatron_rlt.data.rows import check_source, read_rows, require_named, source_digest
from megatron_rlt.data.shards import MANIFEST_FILE, Manifest, content_hash, write_manifest, write_shards
from megatron_rlt.data.validation import RowValidator
from megatron_rlt.disk_faults import writing
from megatron_rlt.folder_lock import IN_FOLDER, locked_beside, locked_folder
from megatron_rlt.given_files import FaultsError
from megatron_rlt.types import Problem
from megatron_rlt.whole_files import (
    flush_to_disk,
    make_folder,
    real,
    require_writable,
    sweep,
    sweep_beside,
    temporary_beside,
)

REJECTED_FILE = "rejected.jsonl"
NUM_EXAMPLES = 3  # rejected rows quoted in an error
HASH_DIGITS = 12  # hexadecimal digits of the source hash in a folder name: 48 bits
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareReport:
    """Result of `prepare_shards`."""

    output_dir: Path
    manifest: Manifest
    reused: bool  # the folder already held this data set

    @property
    def rejected_file(self) -> Path:
        return self.output_dir / REJECTED_FILE

    @property
    def num_source_rows(self) -> int:
        return self.manifest.num_rows + self.manifest.num_rejected


def prepare_shards(config: PrepareConfig) -> PrepareReport:
    """Validate and shard all input rows; reuses an output folder that already holds the same data set.

    Raises ValueError, and writes nothing, for unreadable sources, an output folder with other content or a damaged one,
    no usable row, a share of rejected rows above `max_rejected_fraction`, or where another start writes there.
    """
    if not config.input:
        raise ValueError("input is empty: give JSONL or Parquet files, or one hf://name[:split]")
    for source in config.input:
        check_source(source, config.columns)
    source_hash = _source_hash(config)
    target = config.output_dir
    require_writable("output_dir", target if target.is_dir() else real(target).parent)
    with locked_folder(target) if target.is_dir() else locked_beside(real(target)):
        _sweep(target)
        if (target.is_dir() and any(_kept(target))) or target.is_file():
            return PrepareReport(target, _same_data_set(target, source_hash, config), reused=True)
        is_there, partial = target.is_dir(), _partial_folder(target)
        try:
            with writing(target):
                manifest = _write_data_set(partial, config, source_hash)
                for path in (*sorted(partial.rglob("*")), partial):
                    flush_to_disk(path)  # names never stand for files that a power failure would empty
                if is_there:
                    _move_into(partial, target)
                else:
                    partial.replace(real(target))
                flush_to_disk(target if is_there else real(target).parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return PrepareReport(target, manifest, reused=False)


def ensure_shards(path: Path, work_dir: Path) -> Path:
    """Shard folder for a run's `data.path`: the path itself if it is a folder, else shards made below `work_dir`.

    A second call on an unchanged file reuses the shards. Call it on one rank while the others wait: it reads every
    byte. Raises ValueError as `prepare_shards` and `check_data_set` do.
    """
    if path.is_dir():
        check_data_set(path)
        return path
    config = PrepareConfig(input=(str(path),), output_dir=work_dir)
    check_source(str(path), config.columns)
    folder = work_dir / f"shards-{_source_hash(config)[:HASH_DIGITS]}"
    report = prepare_shards(config.model_copy(update={"output_dir": folder}))
    if report.manifest.num_rejected:
        counts = describe_counts(report.manifest.rejected_by_reason)
        logger.warning(
            "%s: %d of %d rows are unusable (%s), listed in %s",
            path, report.manifest.num_rejected, report.num_source_rows, counts, report.rejected_file,
        )  # fmt: skip
    return folder


def describe_counts(rejected_by_reason: dict[str, int]) -> str:
    """Format as `empty: 2, not_json: 1`, largest count first."""
    ordered = sorted(rejected_by_reason.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {count}" for reason, count in ordered)


def _kept(folder: Path) -> Iterator[Path]:
    """What a folder holds besides the lock."""
    return (path for path in folder.iterdir() if path.name != IN_FOLDER)


def _sweep(target: Path) -> None:
    """Remove what a `prepare` that was killed has left, in a target that exists or beside it."""
    sweep_beside(real(target))
    if target.is_dir():
        sweep(target)


def _partial_folder(target: Path) -> Path:
    """A new folder in which to write: in a target that exists, which may be a link or a mount, else beside it."""
    partial = temporary_beside(target / "data" if target.is_dir() else real(target))
    make_folder(partial)
    return partial


def _move_into(partial: Path, target: Path) -> None:
    """Move a data set into the folder that holds it; the manifest, without which it is none, comes last."""
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        path.rename(target / path.name)


@dataclass
class _Rejections:
    """Writes rejected rows to `rejected.jsonl` and counts them."""

    file: TextIO
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[RejectedRow] = field(default_factory=list)

    def add(self, rejected: RejectedRow) -> None:
        self.file.write(json.dumps(asdict(rejected)) + "\n")
        self.counts[rejected.reason.value] += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(rejected)


def _write_data_set(folder: Path, config: PrepareConfig, source_hash: str) -> Manifest:
    with (folder / REJECTED_FILE).open("w", encoding="utf-8") as file:
        rejections = _Rejections(file)
        shards = write_shards(folder, _usable_rows(config, rejections), rows_per_shard=config.rows_per_shard)
    manifest = Manifest(
        num_rows=sum(shard.num_rows for shard in shards),
        num_rejected=rejections.counts.total(),
        rejected_by_reason=dict(sorted(rejections.counts.items())),
        content_hash=content_hash(shards),
        source_hash=source_hash,
        sources=config.input,
        shards=shards,
    )
    _check_usable(manifest, config, rejections.examples)
    rows_by_shard = {shard.name: shard.num_rows for shard in shards}
    write_energon_index(folder, rows_by_shard, content_hash=manifest.content_hash)
    write_manifest(folder, manifest)
    return manifest


def _usable_rows(config: PrepareConfig, rejections: _Rejections) -> Iterator[Problem]:
    validator = RowValidator(config.columns, max_characters=config.max_characters)
    rows = chain.from_iterable(read_rows(source, config.columns) for source in config.input)
    named = require_named(rows, config.columns.named, ", ".join(config.input))
    for position, row in enumerate(named, start=1):
        if isinstance(row, RejectedRow):
            rejections.add(row)
            continue
        try:
            problem = validator.problem(row.values, position=position)
        except UnusableRowError as error:
            rejections.add(error.rejected(row.file, row.row))
        else:
            yield problem


def _check_usable(manifest: Manifest, config: PrepareConfig, examples: list[RejectedRow]) -> None:
    """Raise ValueError for a data set without rows, or with too many rejected ones."""
    total = manifest.num_rows + manifest.num_rejected
    quoted = [f"  {example}" for example in examples]
    counts = describe_counts(manifest.rejected_by_reason)
    if manifest.num_rows == 0:
        what = f"all {total} rows were rejected ({counts}): mend them or set `columns`" if total else "it has no rows"
        raise FaultsError([f"no usable row in {', '.join(config.input)}: {what}", *quoted])
    if manifest.num_rejected > config.max_rejected_fraction * total:
        what = (
            f"{manifest.num_rejected} of {total} rows were rejected ({counts}), more than max_rejected_fraction "
            f"{config.max_rejected_fraction} allows: mend the rows or raise it"
        )
        raise FaultsError([what, *quoted])


def _same_data_set(target: Path, source_hash: str, config: PrepareConfig) -> Manifest:
    """Manifest of `target`; raises ValueError unless it is this data set."""
    if not (target / MANIFEST_FILE).is_file():
        raise ValueError(f"output_dir {target} is not an empty folder and holds no prepared data set: name another")
    manifest = check_data_set(target)
    if manifest.source_hash != source_hash:
        raise ValueError(
            f"output_dir {target} holds another data set ({manifest.num_rows} rows of "
            f"{', '.join(manifest.sources)}, or other settings): name another folder or remove it"
        )
    _check_usable(manifest, config, [])
    return manifest


def _source_hash(config: PrepareConfig) -> str:
    """Hash of the sources and of every setting that shapes rows and shards; needs no pass over the rows."""
    identity = {
        "sources": [source_digest(source) for source in config.input],
        "columns": config.columns.model_dump(),
        "rows_per_shard": config.rows_per_shard,
        "max_characters": config.max_characters,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
