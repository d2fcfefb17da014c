"""The manifest of a checkpoint folder: its content, and the size and SHA-256 of every file, to detect damage.

It protects itself, too: by a hash of its own content, by the name of its folder, and by naming exactly the files that
are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from megatron_rlt.config.training import Reshardable
from megatron_rlt.whole_files import write_text

FORMAT = 2  # 1: the data position was pickled, and models had object states
STEP_NAME = "step-{:06d}"
_NAME = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """Size and hash of one file."""

    num_bytes: NonNegativeInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SavedLayout(_Record):
    """The layout in which a checkpoint was written."""

    tp: PositiveInt
    pp: PositiveInt
    dp: PositiveInt
    sp: bool
    cp: PositiveInt

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp} cp={self.cp}"


class Manifest(_Record):
    """Content of a checkpoint without its tensors."""

    format: int
    step: NonNegativeInt
    num_updates: NonNegativeInt
    layout: SavedLayout
    models: tuple[str, ...]
    float32_weights: bool  # of the trained model
    reshardable: Reshardable = "full"  # what checkpoints are that were written before there was a choice
    versions: dict[str, str]
    files: dict[str, FileRecord]  # by path relative to the checkpoint's folder

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(record.num_bytes for record in self.files.values())

    def tensors_sha256(self, subfolder: str) -> str:
        """One hash over all tensor files below a subfolder; equal only if every saved bit is equal."""
        names = sorted(name for name in self.files if name.startswith(f"{subfolder}/") and name.endswith(".distcp"))
        lines = (f"{name} {self.files[name].sha256}" for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        content = self.model_dump(mode="json")
        write_text(folder / _NAME, json.dumps(content | {"sha256": _digest(content)}, indent=2))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder that has its final name.

        Raises ValueError if it is missing, malformed, altered, of another format or of another step.
        """
        path = folder / _NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stated, digest = content["format"], content.pop("sha256", None)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a checkpoint manifest ({type(error).__name__}: {error})") from error
        if stated != FORMAT:
            raise ValueError(f"{path} has format {stated!r}; this version reads format {FORMAT}")
        try:
            manifest = cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise ValueError(f"{path} is not a checkpoint manifest ({where}: {fault['msg']})") from error
        if digest != _digest(content):
            raise ValueError(f"{path} was altered: the SHA-256 of its content is not the one it states")
        if folder.resolve().name != (name := STEP_NAME.format(manifest.step)):
            raise ValueError(f"{path} is the manifest of {name}, not of a folder named {folder.resolve().name}")
        if (missing := manifest.missing_file()) is not None:
            raise ValueError(f"{path} does not name {missing}, which every checkpoint of its layout has")
        return manifest

    def missing_file(self) -> str | None:
        """The first file that a checkpoint of these models and this layout has, and that is not recorded."""
        parts = [*(f"models/{name}" for name in self.models), "optimizer"]
        whole = (f"{part}/{name}" for part in parts for name in (".metadata", "metadata.json", "common.pt"))
        ranks = map(rank_file, range(self.layout.num_ranks))  # one by one: a forged layout may have 10^30
        needed = chain(whole, ("shared.json", "data_position.json"), ranks)
        return next((name for name in needed if name not in self.files), None)


def rank_file(rank: int) -> str:
    """The file of a rank, relative to the checkpoint's folder."""
    return f"ranks/rank-{rank:05d}.pt"


def list_files(folder: Path) -> list[str]:
    """Paths of all that is no folder below a folder, relative to it, sorted; links are not followed."""
    return sorted(
        str((Path(place) / name).relative_to(folder))
        for place, folders, files in os.walk(folder)
        for name in (*files, *(name for name in folders if (Path(place) / name).is_symlink()))
    )


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Size and hash of files; flushes them to the disk first."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = FileRecord(num_bytes=file.tell(), sha256=digest)
    return records


def find_difference(folder: Path, manifest: Manifest, below: str = "") -> str | None:
    """Describe the first file, of those whose names start with `below`, that is there or is named without the other."""
    there = {name for name in list_files(folder) if name != _NAME and name.startswith(below)}
    named = {name for name in manifest.files if name.startswith(below)}
    if missing := sorted(named - there):
        return f"{folder / missing[0]} is missing"
    if strange := sorted(there - named):
        return f"{folder / strange[0]} is not of this checkpoint: its manifest does not name it"
    return None


def find_fault(folder: Path, records: Mapping[str, FileRecord]) -> str | None:
    """Describe the first of these files that differs from its record; None if all match."""
    for name, expected in sorted(records.items()):
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            return f"{path} has {num_bytes} bytes instead of {expected.num_bytes}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                return f"{path} was altered: its SHA-256 is not the manifest's"
    return None


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
