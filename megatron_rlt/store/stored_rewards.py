"""Rewards that lie on disk with the per-token values they follow from, whichever command wrote them.

In: a Parquet file of `score` or `collect`, or a run folder of `train`. Out: the reward's settings, and one record an
explanation in the order of the rows. What else such files hold, and computing anything, is left to others.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from megatron_rlt.config.sections import RewardConfig
from megatron_rlt.store.run_folder import CONFIG_FILE
from megatron_rlt.types import FormatFlag

_IDENTITY_KEYS = (b"megatron_rlt.score", b"megatron_rlt.identity")


_STUDENT = ("student_explanation_logprobs", "student_solution_logprobs", "kl_per_token")


_OF_FILES = ("id", "question", "flags", "reward", *_STUDENT, "teacher_explanation_logprobs")


_OF_RUNS = (
    "problem_id", "step", "question_index", "completion_index", "num_explanation_tokens", "flags", "reward",
    *_STUDENT, "old_logprobs",
)  # fmt: skip


_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class StoredLogprobs:
    """What a reward was computed from: E explanation tokens, S solution tokens."""

    student_explanation: Tensor  # [E] float32
    student_solution: Tensor  # [S] float32
    teacher_explanation: Tensor  # [E] float32
    kl_per_token: Tensor | None  # [E] float32, by the estimator of the settings; None: the student's tokens are others

    @property
    def one_tokenizer(self) -> bool:
        """Whether teacher and student scored the same explanation tokens."""
        return self.kl_per_token is not None


@dataclass(frozen=True, eq=False)
class StoredReward:
    """One explanation's reward."""

    problem_id: str
    question: str  # the same for explanations that compete with each other
    explanation_index: int  # among those of its question
    flags: frozenset[FormatFlag]
    reward: float | None  # None: it has none
    logprobs: StoredLogprobs | None  # None: it was too long to be scored


@dataclass(frozen=True)
class StoredRewards:
    """All rewards of one source."""

    settings: RewardConfig  # they were computed with
    files: tuple[Path, ...]
    of_run: bool  # the completion store of a run; otherwise one file of `score` or `collect`

    def __iter__(self) -> Iterator[StoredReward]:
        """The explanations in their order; reads a few rows at a time."""
        seen: Counter[str] = Counter()
        for file in self.files:
            with pq.ParquetFile(file) as parquet:
                columns = list(_OF_RUNS) if self.of_run else _columns_of_file(parquet.schema_arrow)
                for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                    for row in _rows(batch):
                        yield _of_run(row) if self.of_run else _of_file(row, seen)


def open_stored_rewards(source: Path) -> StoredRewards:
    """Find out what a source is, and which settings its rewards have.

    Raises:
        ValueError: it is none, it holds no rewards, or it lacks a column.
    """
    return _open_run(source) if source.is_dir() else _open_file(source)


def _open_run(folder: Path) -> StoredRewards:
    collected = folder / "scored" / "explanations.parquet"
    if collected.is_file():
        raise ValueError(f"source: {folder} is a folder of collect; give its file {collected}")
    file = folder / CONFIG_FILE
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not {"student", "reward", "grpo"} <= settings.keys():
        raise ValueError(
            f"source: {folder} is no run folder of `train` with the RLT reward; give one, or a Parquet file"
        )
    files = tuple(sorted((folder / "completions").glob("step-*.parquet")))
    if not files:
        raise ValueError(
            f"source: {folder} holds no completions/step-N.parquet; train with metrics.store_completions=true"
        )
    for file in files:
        _require_columns(file, pq.read_schema(file).names, _OF_RUNS)
    return StoredRewards(RewardConfig.model_validate(settings["reward"]), files, of_run=True)


def _open_file(file: Path) -> StoredRewards:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source: {file} is no readable Parquet file; give one of score or collect") from error
    metadata = schema.metadata or {}
    identity: dict[str, Any] = next((json.loads(metadata[key]) for key in _IDENTITY_KEYS if key in metadata), {})
    settings = _section(identity, "reward")
    if not settings:
        raise ValueError(f"source: {file} was not written by score or collect; give a file of theirs, or a run folder")
    _require_columns(file, schema.names, _OF_FILES)
    if "student" in schema.names and _is_null(pq.read_table(file, columns=["student"])["student"]):
        raise ValueError(
            f"source: {file} was collected without a student and has no rewards; collect with student.model"
        )
    return StoredRewards(RewardConfig.model_validate(settings), (file,), of_run=False)


def _section(flat: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a configuration with dotted keys that stands below one of them, as a tree."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, *path = dotted.split(".")
        if section != name or not path:
            continue
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def _require_columns(file: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"source: {file} lacks the columns {', '.join(missing)}; make it again with this version")


def _columns_of_file(schema: pa.Schema) -> list[str]:
    return [*_OF_FILES, *(name for name in ("explanation_index",) if name in schema.names)]


def _is_null(column: pa.ChunkedArray) -> bool:
    return bool(column.null_count == len(column))


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows by column; lists of numbers as tensors, without making a Python object of every number."""
    lists = [field.name for field in batch.schema if field.type == pa.list_(pa.float32())]
    plain = batch.select([name for name in batch.schema.names if name not in lists]).to_pylist()
    for index, row in enumerate(plain):
        yield row | {name: _tensor(batch[name][index]) for name in lists}


def _tensor(cell: pa.ListScalar) -> Tensor | None:
    if not cell.is_valid:
        return None
    return torch.tensor(cell.values.to_numpy(zero_copy_only=False), dtype=torch.float32)


def _of_file(row: Mapping[str, Any], seen: Counter[str]) -> StoredReward:
    """A row of `collect`, whose explanations of one question share its id; or of `score`, where they share its text."""
    of_collect = "explanation_index" in row
    question = row["id"] if of_collect else row["question"]
    seen[question] += 1
    return StoredReward(
        problem_id=row["id"],
        question=question,
        explanation_index=row["explanation_index"] if of_collect else seen[question] - 1,
        flags=_flags(row),
        reward=row["reward"],
        logprobs=_logprobs(row, row["teacher_explanation_logprobs"]),
    )


def _of_run(row: Mapping[str, Any]) -> StoredReward:
    """A row of the completion store: the teacher is the policy before the update."""
    return StoredReward(
        problem_id=row["problem_id"],
        question=f"step {row['step']}, question {row['question_index']}",
        explanation_index=row["completion_index"],
        flags=_flags(row),
        reward=None if math.isnan(row["reward"]) else row["reward"],
        logprobs=_logprobs(row, row["old_logprobs"][: row["num_explanation_tokens"]]),
    )


def _flags(row: Mapping[str, Any]) -> frozenset[FormatFlag]:
    return frozenset(FormatFlag(flag) for flag in row["flags"])


def _logprobs(row: Mapping[str, Any], teacher_explanation: Tensor | None) -> StoredLogprobs | None:
    if teacher_explanation is None:
        return None
    return StoredLogprobs(
        student_explanation=row["student_explanation_logprobs"],
        student_solution=row["student_solution_logprobs"],
        teacher_explanation=teacher_explanation,
        kl_per_token=row["kl_per_token"],
    )
