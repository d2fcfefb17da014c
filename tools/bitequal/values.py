"""What one run left behind, as flat values by name: numbers as they are, bytes and long lists as hashes.

In: a run's folder. Out: JSON values by a name such as `metrics/3/loss` or `rows/1/train-00007/2/reward`. Seconds, bytes
of memory and paths are left out: they belong to the machine. What a newer version calls otherwise stands in `_COLUMNS`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tools.bitequal.runs import Run

_OF_THE_MACHINE = (
    *("seconds/", "save/", "tokens_per_second/", "model_flops_per_second/", "peak_share/", "explanations_per_second"),
    *("host_bytes/", "host_peak_bytes", "memory/", "rows_per_second", "answers_per_second"),
)
_METRICS, _RESULTS, _PARITY = "metrics.jsonl", "results.json", "parity.json"
_OF_PLACES = ("data", "model", "settings")  # of results.json: they name paths
_STEP, _PROBLEM = ("step",), ("problem_id", "id")
_MEMBER = ("completion_index", "explanation_index", "sample")
# Columns by their canonical name; the first of the names that a table has is taken.
_COLUMNS: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        *("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty", "advantage"),
        *("rewards_by_student", "solution_overlap", "states_the_answer", "repetition", "epistemic_per_100_words"),
        *("baseline_logprob", "gain", "rank", "old_reward", "old_rank", "dropped", "flags", "finish_reason", "seed"),
        *("policy_version", "temperature", "completion_ids", "student_tokens"),
        *("rollout_logprobs", "old_logprobs", "student_explanation_logprobs", "student_solution_logprobs"),
        *("kl_per_token", "teacher_explanation_logprobs", "question_index", "prompt_tokens", "row", "solution_tokens"),
        *("answer", "reference", "correct", "reason"),
    )
} | {
    "prompt_ids": ("teacher_prompt_ids", "prompt_ids"),
    "control_ids": ("placebo_ids", "control_ids"),
    "text": ("text", "explanation", "completion"),
    "explanation_tokens": ("num_explanation_tokens", "explanation_tokens"),
    "completion_tokens": ("completion_tokens", "tokens"),
}
_LONGEST_TEXT = 40


def values_of(run: Run) -> dict[str, Any]:
    """Everything of a run that equal code gives equally."""
    folder = run.folder
    scoring = (folder / run.table).parent  # of a collection; several may share the folder
    values = {**_metrics(folder, scoring), **_results(folder), **_parity(folder), **_files(folder, scoring)}
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        values |= _checkpoint(checkpoint)
    rows = _rows(sorted(folder.glob(run.table))) if run.table else {}
    return values | (_by_row(rows) if run.by_row else _by_step(rows))


def _metrics(folder: Path, scoring: Path) -> dict[str, Any]:
    """Of the run itself, or of a collection's samples and of its scoring."""
    values: dict[str, Any] = {}
    for place in dict.fromkeys((folder, folder / "samples", scoring)):
        file = place / _METRICS
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), start=1):
            numbers = {name: value for name, value in json.loads(line).items() if not name.startswith(_OF_THE_MACHINE)}
            head = "/".join(("metrics", *place.relative_to(folder).parts, str(number)))
            values |= {f"{head}/{name}": value for name, value in numbers.items()}
    return values


def _results(folder: Path) -> dict[str, Any]:
    """Scores of an evaluation."""
    found = json.loads((folder / _RESULTS).read_text()) if (folder / _RESULTS).is_file() else {}
    return {f"results/{name}": value for name, value in found.items() if name not in _OF_PLACES}


def _parity(folder: Path) -> dict[str, Any]:
    gaps = json.loads((folder / _PARITY).read_text()) if (folder / _PARITY).is_file() else []
    return {f"parity/{number}/{name}": value for number, gap in enumerate(gaps) for name, value in gap.items()}


def _files(folder: Path, scoring: Path) -> dict[str, Any]:
    """Hashes of files whose bytes are the result: exported weights, shards, training rows, worst completions."""
    found = {*folder.glob("hf/**/*"), *folder.glob("*.tar"), *folder.glob("*.idx"), *folder.glob("*.jsonl")}
    files = sorted(path for path in {*found, *scoring.glob("sft_*.jsonl")} if path.is_file() and path.name != _METRICS)
    return {f"files/{path.relative_to(folder)}": _sha(path.read_bytes()) for path in files}


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Every file but the manifest, which names versions; and every tensor, should a file's name change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    values = {f"{folder.name}/bytes/{path.relative_to(folder)}": _sha(_lasting_bytes(path)) for path in files}
    for metadata in sorted(folder.rglob(".metadata")):
        state: dict[str, Any] = {}
        planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
        _load_state_dict(state, storage_reader=FileSystemReader(metadata.parent), planner=planner, no_dist=True)
        for name, tensor in _tensors(state):
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            values[f"{folder.name}/tensors/{metadata.parent.name}/{name}"] = f"{tuple(tensor.shape)} {_sha(content)}"
    return values


def _lasting_bytes(file: Path) -> bytes:
    """A checkpoint file's content without what differs between two runs of the same code.

    torch writes the folder's path and a random id into `.metadata`; python's and numpy's random states, which nothing
    seeds and nothing uses, stand in the files of ranks.
    """
    if file.name == ".metadata":
        metadata = FileSystemReader(file.parent).read_metadata()
        return repr((metadata.state_dict_metadata, metadata.storage_data)).encode()
    if file.parent.name == "ranks":
        content = torch.load(file, weights_only=True)
        states = torch.load(io.BytesIO(bytes(content["rng"])), weights_only=True)
        lasting = (sorted(states), states["torch"].tolist(), states["megatron"], bytes(content["extra"]))
        return repr(lasting).encode()
    return file.read_bytes()


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}/")


def _rows(files: list[Path]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Cells by canonical column, by (step, problem, member)."""
    seen: Counter[tuple[Any, ...]] = Counter()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files:
        for cells in pq.read_table(file).to_pylist():
            step, problem = _first(cells, _STEP, 0), _first(cells, _PROBLEM, None)
            key = (step, problem, _first(cells, _MEMBER, 0))
            seen[key] += 1
            rows[key if seen[key] == 1 else (*key[:2], f"{key[2]}, time {seen[key]}")] = _canonical(cells)
    return rows


def _canonical(cells: dict[str, Any]) -> dict[str, Any]:
    row = {
        name: next(cells[word] for word in words if word in cells)
        for name, words in _COLUMNS.items()
        if any(word in cells for word in words)
    }
    if row.get("old_logprobs") is not None and row.get("teacher_explanation_logprobs") is None:
        row["teacher_explanation_logprobs"] = row["old_logprobs"][: row["explanation_tokens"]]
    return {name: _cell(name, value) for name, value in row.items()}


def _cell(name: str, value: Any) -> Any:  # noqa: ANN401 - one cell of any column
    """What is not a number is null; numbers per token are the hash of their bytes."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return _sha(value.encode())
    if isinstance(value, list) and name.endswith(("_ids", "_logprobs", "_per_token")):
        array = np.asarray(value, dtype=np.int64 if name.endswith("_ids") else np.float32)
        return f"{len(value)} {_sha(array.tobytes())}"
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return {word: _cell(word, item) for word, item in value}
    return value


def _by_row(rows: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    return {"/".join(map(str, ("rows", *key, name))): cell for key, row in rows.items() for name, cell in row.items()}


def _by_step(rows: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """One hash per step and column, for runs with many rows; rows in the order of their keys."""
    cells: dict[tuple[Any, str], list[str]] = defaultdict(list)
    for key, row in sorted(rows.items(), key=lambda item: tuple(map(str, item[0]))):
        for name, cell in row.items():
            cells[key[0], name].append(f"{key} {cell!r}")
    return {f"rows/{step}/{name}": _sha("\n".join(lines).encode()) for (step, name), lines in cells.items()}


def _first(cells: dict[str, Any], words: tuple[str, ...], default: Any) -> Any:  # noqa: ANN401 - a cell
    return next((cells[word] for word in words if cells.get(word) is not None), default)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
