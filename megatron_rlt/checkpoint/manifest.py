"""The manifest of a checkpoint folder: its content, and the size and SHA-256 of every file, to detect damage."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rlt.whole_files import write_text

FORMAT = 1
_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SavedLayout:
    """The layout in which a checkpoint was written."""

    tp: int
    pp: int
    dp: int
    sp: bool
    cp: int = 1  # absent from checkpoints older than context parallelism


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint without its tensors."""

    format: int
    step: int
    num_updates: int
    layout: SavedLayout
    models: tuple[str, ...]
    float32_weights: bool  # of the trained model
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]  # by path relative to the checkpoint's folder

    def tensors_sha256(self, subfolder: str) -> str:
        """One hash over all tensor files below a subfolder; equal only if every saved bit is equal."""
        names = sorted(name for name in self.files if name.startswith(f"{subfolder}/") and name.endswith(".distcp"))
        lines = (f"{name} {self.files[name].sha256}" for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        write_text(folder / _NAME, json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest. Raises ValueError if it is missing, malformed or of another format."""
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
    """Size and hash of files; flushes them to the disk first."""
    records = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[name] = FileRecord(file.tell(), digest)
    return records


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
