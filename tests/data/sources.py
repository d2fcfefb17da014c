"""Small source files and prepared folders for the tests of `data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlt.config.commands.prepare import PrepareConfig
from megatron_rlt.data.prepare import PrepareReport, prepare_shards

GOOD = {"id": "good", "question": "1 + 1?", "solution": "2"}


def write_lines(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    """A JSONL file of raw lines and of objects."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def numbered_rows(num_rows: int) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "question": f"{i} + 1?", "solution": f"{i + 1}"} for i in range(num_rows)]


def prepare(output_dir: Path, *sources: Path | str, **settings: Any) -> PrepareReport:
    return prepare_shards(PrepareConfig(input=tuple(map(str, sources)), output_dir=output_dir, **settings))


def numbered_shards(folder: Path, num_rows: int, *, rows_per_shard: int = 10) -> Path:
    """A prepared folder with the problems p0, p1, ..."""
    source = write_lines(folder / "rows.jsonl", *numbered_rows(num_rows))
    return prepare(folder / "shards", source, rows_per_shard=rows_per_shard).output_dir


def conversation(
    question: str,
    answer: str,
    *,
    keys: tuple[str, str] = ("from", "value"),
    roles: tuple[str, str] = ("user", "assistant"),
) -> list[dict[str, str]]:
    return [{keys[0]: role, keys[1]: text} for role, text in zip(roles, (question, answer), strict=True)]


def stratos_answer(thought: str, solution: str) -> str:
    return (
        f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\n{solution}\n\n<|end_of_solution|>"
    )
