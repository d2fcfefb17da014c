"""The manifest of a checkpoint folder: what it holds, and the hash of every file, so that a damaged one is recognised.

A folder is a checkpoint when it has a manifest; it is intact when every file in it has the size and hash written there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FORMAT = 1


_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """What is known of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedLayout:
    """The layout a checkpoint was written in."""

    tp: int
    pp: int
    dp: int
    sp: bool
    cp: int = 1  # checkpoints written before there was context parallelism do not say


@dataclass(frozen=True)
class Manifest:
    """Everything known of a checkpoint without opening its tensors."""

    format: int
    step: int
    num_updates: int
    layout: SavedLayout
    models: tuple[str, ...]
    float32_weights: bool  # of the trained model
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]  # by path relative to the checkpoint's folder

    def tensors_sha256(self, subfolder: str) -> str:
        """One hash over all tensor files below a subfolder; equal only when every saved bit is equal."""
        names = sorted(name for name in self.files if name.startswith(f"{subfolder}/") and name.endswith(".distcp"))
        lines = (f"{name} {self.files[name].sha256}" for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        write_synced(folder / _NAME, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            ValueError: there is none, it is not ours, or it is of another format.
        """
        path = folder / _NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"{path} has format {content['format']}; this version reads format {FORMAT}")
            content["layout"] = SavedLayout(**content["layout"])
            content["models"] = tuple(content["models"])
            content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
            return cls(**content)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a checkpoint manifest ({type(error).__name__}: {error})") from error


def list_files(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Size and hash of files as they are on disk; flushes them to the disk first."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = FileRecord(file.tell(), digest)
    return records


def find_fault(folder: Path, records: Mapping[str, FileRecord]) -> str | None:
    """What is wrong with the first of these files that is not as recorded, or None."""
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


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
