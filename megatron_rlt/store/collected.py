"""Collected explanations on disk: what a teacher sampled, then the same with all that scoring found out.

In: explanations part by part, with their scores if there are any, and their origin. Out: a folder of sampled parts,
which several scorings can share, and for each scoring one Parquet file with a row an explanation. Only one rank calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.store.parts import PartStore
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem, RewardParts

PARTS = ("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty")
"""Columns of the reward and what it is made of; null where an explanation has none."""


_PER_TOKEN = (
    "student_explanation_logprobs",
    "student_solution_logprobs",
    "teacher_explanation_logprobs",
    "kl_per_token",
)


_IDS, _LOGPROBS = pa.list_(pa.int64()), pa.list_(pa.float32())


_SAMPLED = (
    ("id", pa.string()),
    ("row", pa.int64()),  # the question's place in the data set, from 1
    ("explanation_index", pa.int64()),
    ("question", pa.string()),
    ("solution", pa.string()),
    ("explanation", pa.string()),
    ("finish_reason", pa.string()),
    ("flags", pa.list_(pa.string())),
    ("prompt_tokens", pa.int64()),
    ("completion_tokens", pa.int64()),
    ("explanation_tokens", pa.int64()),  # the first so many ids of the completion
    ("seed", pa.int64()),
    ("completion_ids", _IDS),
    ("rollout_logprobs", _LOGPROBS),
)


_SCORED = (
    *((name, pa.float64()) for name in PARTS),
    ("dropped", pa.string()),  # why there is no reward; null also where none was asked for
    ("student_tokens", pa.int64()),  # of the whole student sequence around the explanation
    ("placebo_ids", _IDS),  # what was scored in the explanation's place; null without placebo
    *((name, _LOGPROBS) for name in _PER_TOKEN),
)


_ORIGIN_TYPES = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclass(frozen=True)
class Origin:
    """What all rows of a file have in common: who wrote them, how, and who scored them."""

    teacher: str  # folder
    teacher_fingerprint: str
    student: str | None  # None: not scored
    student_fingerprint: str | None
    placebo: str
    temperature: float  # of sampling and of all log-probs
    top_p: float
    max_completion_tokens: int
    run_seed: int


@dataclass(frozen=True, eq=False)
class SampledExplanation:
    """One explanation as its teacher wrote it."""

    problem: Problem
    row: int  # the question's place in the data set, from 1
    explanation_index: int
    completion: Completion
    flags: tuple[FormatFlag, ...]
    text: str
    num_prompt_tokens: int
    num_explanation_tokens: int

    @property
    def explanation_ids(self) -> Tensor:
        return self.completion.token_ids[: self.num_explanation_tokens]


@dataclass(frozen=True, eq=False)
class ExplanationScore:
    """What scoring found out about one explanation."""

    student_tokens: int
    parts: RewardParts | None  # None: it was not scored
    dropped: str | None
    placebo_ids: Tensor | None


@dataclass(frozen=True)
class CollectedExplanation:
    """One row of a finished file, as far as selection needs it."""

    problem: Problem
    row: int  # the question's place in the data set, from 1
    explanation_index: int
    text: str
    flags: tuple[str, ...]
    reward: float | None
    student_tokens: int


@dataclass(frozen=True)
class CollectionSummary:
    """What a person wants to know of a finished file."""

    num_questions: int
    num_explanations: int
    means: dict[str, float]  # of `PARTS` and lengths over the rows that have the value; nan where none has
    dropped: Counter[str]
    flags: Counter[str]
    num_well_formed: int


class SampleStore(PartStore):
    """The parts that a teacher sampled; a part holds all explanations of its questions."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        super().__init__(folder, pa.schema(_SAMPLED), identity)

    def write_samples(self, number: int, samples: Sequence[SampledExplanation]) -> None:
        """Write a part, whole or not at all."""
        self.write(number, [_sampled_cells(sample) for sample in samples])

    def read_samples(self, number: int, *, temperature: float) -> list[SampledExplanation]:
        """A part as it was written; `temperature` is that of its log-probs."""
        table = self.read(number)
        lists = {name: _tensors(table[name], dtype) for name, dtype in _LIST_DTYPES.items()}
        rows = table.drop_columns(list(lists)).to_pylist()
        return [
            _sample(row, lists["completion_ids"][index], lists["rollout_logprobs"][index], temperature)
            for index, row in enumerate(rows)
        ]


class ExplanationStore(PartStore):
    """The parts of one scoring, each the sampled part with its scores and its origin beside it."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], origin: Origin) -> None:
        self._origin_fields = [(field.name, _ORIGIN_TYPES[str(field.type)]) for field in fields(Origin)]
        self._origin = origin
        columns = dict([*_SAMPLED, *_SCORED, *self._origin_fields])
        lists_last = sorted(columns, key=lambda name: columns[name] in (_IDS, _LOGPROBS))
        super().__init__(folder, pa.schema([(name, columns[name]) for name in lists_last]), identity)

    def write_scores(self, number: int, samples: SampleStore, scores: Sequence[ExplanationScore]) -> None:
        """Write a part, whole or not at all.

        Args:
            scores: one a row of the sampled part, in its order.
        """
        table = samples.read(number)
        assert len(scores) == table.num_rows, f"{len(scores)} scores for {table.num_rows} explanations"
        cells = [_score_cells(score) for score in scores]
        for name, kind in _SCORED:
            table = table.append_column(name, pa.array([cell[name] for cell in cells], type=kind))
        for name, kind in self._origin_fields:
            value = asdict(self._origin)[name]
            table = table.append_column(name, pa.array([value] * len(scores), type=kind))
        self.write_table(number, table.select(self._schema.names))


def read_collected(file: Path) -> Iterator[CollectedExplanation]:
    """The rows of a finished file in their order, without ids and log-probs."""
    columns = ["id", "question", "solution", "row", "explanation_index", "explanation", "flags", "reward"]
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=1024, columns=[*columns, "dropped", "student_tokens"]):
            for row in batch.to_pylist():
                yield CollectedExplanation(
                    problem=Problem(row["id"], row["question"], row["solution"]),
                    row=row["row"],
                    explanation_index=row["explanation_index"],
                    text=row["explanation"],
                    flags=tuple(row["flags"]),
                    reward=row["reward"] if row["dropped"] is None else None,
                    student_tokens=row["student_tokens"],
                )


def summarize_collected(file: Path) -> CollectionSummary:
    """Read a finished file's numbers, without texts, ids and log-probs."""
    lengths = ("prompt_tokens", "completion_tokens", "explanation_tokens", "student_tokens")
    table = pq.read_table(file, columns=["row", "flags", "dropped", *PARTS, *lengths])
    flags = table["flags"].to_pylist()
    means = {name: Tally.of(filter(_is_finite, table[name].to_pylist())).mean for name in PARTS}
    return CollectionSummary(
        num_questions=len(pa.compute.unique(table["row"])),
        num_explanations=table.num_rows,
        means=means | {name: Tally.of(table[name].to_pylist()).mean for name in lengths},
        dropped=Counter(reason for reason in table["dropped"].to_pylist() if reason is not None),
        flags=Counter(flag for row in flags for flag in row),
        num_well_formed=sum(not row for row in flags),
    )


_LIST_DTYPES = {"completion_ids": torch.int64, "rollout_logprobs": torch.float32}


def _sampled_cells(sample: SampledExplanation) -> dict[str, Any]:
    completion = sample.completion
    return {
        "id": sample.problem.problem_id,
        "row": sample.row,
        "explanation_index": sample.explanation_index,
        "question": sample.problem.question,
        "solution": sample.problem.solution,
        "explanation": sample.text,
        "finish_reason": completion.finish_reason.value,
        "flags": sorted(flag.value for flag in sample.flags),
        "prompt_tokens": sample.num_prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "explanation_tokens": sample.num_explanation_tokens,
        "seed": completion.seed,
        "completion_ids": completion.token_ids.numpy(),
        "rollout_logprobs": completion.rollout_logprobs.numpy(),
    }


def _sample(row: Mapping[str, Any], ids: Tensor, logprobs: Tensor, temperature: float) -> SampledExplanation:
    return SampledExplanation(
        problem=Problem(row["id"], row["question"], row["solution"]),
        row=row["row"],
        explanation_index=row["explanation_index"],
        completion=Completion(ids, logprobs, temperature, FinishReason(row["finish_reason"]), row["seed"], 0),
        flags=tuple(FormatFlag(flag) for flag in row["flags"]),
        text=row["explanation"],
        num_prompt_tokens=row["prompt_tokens"],
        num_explanation_tokens=row["explanation_tokens"],
    )


def _score_cells(score: ExplanationScore) -> dict[str, Any]:
    """Values by column; what is not a number becomes null, infinities and per-token values stay visible."""
    found = {} if score.parts is None else vars(score.parts)
    scalars = {name: found.get(name) for name in PARTS}
    per_token: dict[str, Tensor | None] = {name: found.get(name) for name in _PER_TOKEN}
    return {
        **{name: None if value is None or math.isnan(value) else value for name, value in scalars.items()},
        "dropped": score.dropped,
        "student_tokens": score.student_tokens,
        "placebo_ids": None if score.placebo_ids is None else score.placebo_ids.numpy(),
        **{name: None if values is None else values.numpy() for name, values in per_token.items()},
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _tensors(column: pa.ChunkedArray, dtype: torch.dtype) -> list[Tensor]:
    """A column of lists as one tensor a row, without making a Python object of every number."""
    return [torch.tensor(cell.values.to_numpy(zero_copy_only=False), dtype=dtype) for cell in column]
