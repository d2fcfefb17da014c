"""What a run leaves behind that depends on nothing but its settings: equal for equal runs, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_rlt.metrics.writer import read_metrics

_OF_THE_MACHINE = (
    *("seconds/", "save/", "tokens_per_second/", "model_flops_per_second/", "peak_share/"),
    *("host_bytes/", "host_peak_bytes", "memory/"),
)


@dataclass(frozen=True)
class Outcome:
    """Of a training command."""

    metrics: list[dict[str, Any]]
    weights: dict[str, str]  # SHA-256 by file of hf/
    completions: dict[str, str]  # SHA-256 by file


def outcome(folder: Path) -> Outcome:
    """Read a run folder."""
    metrics = [
        {name: value for name, value in step.items() if not name.startswith(_OF_THE_MACHINE)}
        for step in read_metrics(folder)
    ]
    return Outcome(metrics, hashes(folder / "hf"), hashes(folder / "completions"))


def hashes(folder: Path, *, keep: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path."""
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items() if keep(name)}


Results = dict[str, str]
"""SHA-256 by name of a result."""


def training_results(folder: Path) -> Results:
    """Of `train`, `sft` and `rlvr`: metrics without timings, weights, completions."""
    found = outcome(folder)
    files = {f"hf/{name}": digest for name, digest in found.weights.items()}
    files |= {f"completions/{name}": digest for name, digest in found.completions.items()}
    return {"metrics without timings": _digest(found.metrics), **files}


def row_results(folder: Path) -> Results:
    """Of commands that work in parts: the contents of Parquet files outside parts folders, and the rows of JSONL.

    A kill may lose a part's line of metrics; none may stand twice, which `repeated_steps` looks at.
    """
    tables = {str(path.relative_to(folder)): pq.read_table(path) for path in _finished(folder, ".parquet")}
    texts = {str(path.relative_to(folder)): path.read_bytes() for path in _finished(folder, ".jsonl")}
    return {name: _digest([str(table.schema), table.to_pylist()]) for name, table in tables.items()} | {
        name: hashlib.sha256(content).hexdigest() for name, content in texts.items()
    }


def repeated_steps(folder: Path) -> list[str]:
    """Metrics files below a folder in which a step stands twice."""
    faults = []
    for file in folder.rglob("metrics.jsonl"):
        steps = [record["step"] for record in read_metrics(file.parent)]
        if steps != sorted(set(steps)):
            faults.append(f"{file}: steps {steps}")
    return faults


def leftovers(folder: Path) -> list[str]:
    """Temporary names and locks that a finished command left below a folder."""
    found = [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    return sorted(str(path.relative_to(folder)) for path in found)


def _finished(folder: Path, suffix: str) -> list[Path]:
    files = sorted(folder.rglob(f"*{suffix}"))
    return [file for file in files if not file.name.startswith((".", "metrics", "part-"))]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()
