"""Gives a checkpoint that was changed a manifest that fits, as somebody who crafts one would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlt.checkpoint.manifest import FileRecord, Manifest, hash_files, list_files

MANIFEST = "manifest.json"


def reseal(folder: Path, **changes: Any) -> None:
    """Write a manifest of exactly the files that are there; `changes`: its other fields."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"], content["files"]
    names = [name for name in list_files(folder) if name != MANIFEST]
    files = {name: record.model_dump() for name, record in hash_files(folder, names).items()}
    Manifest.model_validate_json(json.dumps(content | {"files": files} | changes)).write(folder)


def recorded(folder: Path) -> dict[str, FileRecord]:
    """The files that a manifest names."""
    return Manifest.read(folder).files
