"""The scores of explanations on disk: complete parts while they are computed, one Parquet file in the end.

In: scored rows in the input's order, and the identity of what was asked. Out: `OUTPUT`; beside it `OUTPUT.parts/`
until all rows are scored. Parts and output carry the identity, so that rows of two different runs never meet in one
file. Only one rank calls. Which rows, and how they are scored, is the job's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.store.run_folder import describe_changes
from megatron_rlt.types import FormatFlag, RewardParts, ScoringPair

PARTS = ("reward", "r_ss", "r_ss_mean", "r_ss_min", "r_kl", "r_kl_mean", "r_kl_max", "penalty")
"""Columns of the reward and what it is made of; null where a row has none."""


GAINS = ("baseline_logprob", "gain")
"""Columns of the mean solution log-prob without explanation and of what an explanation adds; null if not asked for."""


_PER_TOKEN = (
    "student_explanation_logprobs",
    "student_solution_logprobs",
    "teacher_explanation_logprobs",
    "kl_per_token",
)


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        *((name, pa.float64()) for name in (*PARTS, *GAINS)),
        ("explanation_tokens", pa.int64()),
        ("solution_tokens", pa.int64()),
        ("flags", pa.list_(pa.string())),
        ("dropped", pa.string()),
        *((name, pa.list_(pa.float32())) for name in _PER_TOKEN),
    ]
)


_RANK = pa.field("rank", pa.int64())  # within the question, known only when all parts are; null without a reward


_IDENTITY_FILE, _IDENTITY_KEY = "identity.json", b"megatron_rlt.score"


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """One row of the output: an explanation with its reward, or with the reason why it has none."""

    pair: ScoringPair
    parts: RewardParts
    dropped: str | None
    baseline_logprob: float  # mean over the solution's tokens without an explanation; nan if not asked for
    gain: float  # r_ss_mean minus that

    def cells(self) -> dict[str, Any]:
        """Values by column; what is not a number becomes null, infinities and per-token values stay visible."""
        scalars = {name: vars(self.parts)[name] for name in PARTS} | {name: vars(self)[name] for name in GAINS}
        per_token: dict[str, Tensor | None] = {name: vars(self.parts)[name] for name in _PER_TOKEN}
        return {
            "id": self.pair.problem.problem_id,
            "question": self.pair.problem.question,
            **{name: None if math.isnan(value) else value for name, value in scalars.items()},
            "explanation_tokens": self.pair.num_explanation_tokens,
            "solution_tokens": len(self.parts.student_solution_logprobs),
            "flags": sorted(flag.value for flag in self.pair.flags),
            "dropped": self.dropped,
            **{name: None if values is None else values.numpy() for name, values in per_token.items()},
        }


@dataclass(frozen=True)
class ScoreSummary:
    """What a person wants to know of a finished output."""

    num_rows: int
    means: dict[str, float]  # of `PARTS` and `GAINS`, over the rows with a reward and this value; nan where none has it
    dropped: Counter[str]  # rows without a reward, by reason
    flags: Counter[FormatFlag]


class ScoreStore:
    """One output file and its parts."""

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        """`identity`: JSON values by name; parts and outputs with another one are refused."""
        self.output = output
        self.parts = output.with_name(f"{output.name}.parts")
        self._identity = json.loads(json.dumps(identity))  # as it reads back

    def is_finished(self) -> bool:
        """Whether the output is there already; what else a run may have left is checked, too.

        Raises:
            ValueError: output or parts are those of another run, or no scores at all.
        """
        if self.output.exists():
            self._check(self.output, _identity_of_output(self.output), remedy="or remove that file")
            return True
        if self.parts.exists():
            self._check(self.parts, _identity_of_parts(self.parts), remedy="put the values back, or remove that folder")
        return False

    def begin(self) -> int:
        """Make the folder of parts, or find it; returns the number of complete parts from the first on."""
        self.parts.mkdir(parents=True, exist_ok=True)
        identity_file = self.parts / _IDENTITY_FILE
        if not identity_file.is_file():
            temporary = identity_file.with_name(f".{_IDENTITY_FILE}.tmp")
            temporary.write_text(json.dumps(self._identity, indent=2), encoding="utf-8")
            temporary.replace(identity_file)
        number = 0
        while _is_complete(self._part(number)):
            number += 1
        return number

    def write_part(self, number: int, rows: Sequence[ScoredRow]) -> None:
        """Write a part, whole or not at all."""
        cells = [row.cells() for row in rows]
        columns = [pa.array([cell[column.name] for cell in cells], type=column.type) for column in _SCHEMA]
        self._write(self._part(number), [pa.Table.from_arrays(columns, schema=_SCHEMA)], _SCHEMA)

    def rewards(self, num_parts: int) -> tuple[list[str], list[float | None]]:
        """Question and reward of every row of the parts, in their order."""
        tables = [pq.read_table(self._part(number), columns=["question", "reward"]) for number in range(num_parts)]
        joined = pa.concat_tables(tables)
        return joined["question"].to_pylist(), joined["reward"].to_pylist()

    def finish(self, num_parts: int, ranks: Sequence[int | None]) -> None:
        """Put the parts together under the output's name, with a rank a row, then remove them."""
        schema = _SCHEMA.insert(_SCHEMA.get_field_index(PARTS[0]) + 1, _RANK)
        schema = schema.with_metadata({_IDENTITY_KEY: json.dumps(self._identity)})
        self._write(self.output, self._ranked_parts(num_parts, ranks, schema), schema)
        self.clean_up()

    def _ranked_parts(self, num_parts: int, ranks: Sequence[int | None], schema: pa.Schema) -> Iterator[pa.Table]:
        done = 0
        for number in range(num_parts):
            table = pq.read_table(self._part(number))
            column = pa.array(ranks[done : done + table.num_rows], type=_RANK.type)
            done += table.num_rows
            yield table.append_column(_RANK, column).select(schema.names).cast(schema)

    def clean_up(self) -> None:
        """Remove the parts of a finished output."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.parts / f"part-{number:06d}.parquet"

    def _check(self, path: Path, identity: Mapping[str, Any] | None, *, remedy: str) -> None:
        if identity is None:
            raise ValueError(f"output: {path} exists and was not written by score; choose another output, {remedy}")
        changes = describe_changes(identity, self._identity)
        if changes:
            raise ValueError(
                f"output: {path} was made by another scoring run: {changes}. Nothing is overwritten: "
                f"choose another output, {remedy}"
            )

    @staticmethod
    def _write(path: Path, tables: Any, schema: pa.Schema) -> None:  # noqa: ANN401 - tables of an untyped package
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def summarize_scores(output: Path) -> ScoreSummary:
    """Read a finished output's numbers, the per-token lists left out."""
    table = pq.read_table(output, columns=[*PARTS, *GAINS, "dropped", "flags"])
    kept = table.filter(pa.compute.is_null(table["dropped"]))
    return ScoreSummary(
        num_rows=table.num_rows,
        means={name: Tally.of(kept[name].drop_null().to_pylist()).mean for name in (*PARTS, *GAINS)},
        dropped=Counter(reason for reason in table["dropped"].to_pylist() if reason is not None),
        flags=Counter(FormatFlag(flag) for flags in table["flags"].to_pylist() for flag in flags),
    )


def _identity_of_output(output: Path) -> dict[str, Any] | None:
    """None for a file that is not ours."""
    try:
        metadata = pq.read_schema(output).metadata or {}
    except (pa.ArrowException, OSError):
        return None
    identity: dict[str, Any] | None = json.loads(metadata[_IDENTITY_KEY]) if _IDENTITY_KEY in metadata else None
    return identity


def _identity_of_parts(folder: Path) -> dict[str, Any] | None:
    file = folder / _IDENTITY_FILE
    if not file.is_file():
        return None
    identity: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return identity


def _is_complete(part: Path) -> bool:
    """A part appears by renaming, so one that is there is whole; one that is damaged all the same is done again."""
    try:
        pq.read_metadata(part)
    except (pa.ArrowException, OSError):
        return False
    return True
