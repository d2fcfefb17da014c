"""A file of one JSON line a step in which no step stands twice, also after a kill and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends records with a `step`. What stands behind the last step that is kept is removed at the beginning."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Args: resumed_step: last step that is kept; what stands behind it will be done again."""
        kept = [line for line, record in complete_lines(path) if record["step"] <= resumed_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a step once; a number that is not finite becomes null."""
        record = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def complete_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines with their records, oldest first. The line a killed run left half is not among them."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [(line, json.loads(line)) for line in lines if line.endswith("}\n")]


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    return None if isinstance(value, float) and not math.isfinite(value) else value
