"""The questions that `collect` explains: all rows of a data set once, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.config.commands.collect import ShareConfig
from megatron_rlt.data.loader import scan_problems
from megatron_rlt.data.rejection import RejectReason, rejected_as
from megatron_rlt.data.shards import read_manifest
from megatron_rlt.jobs.run.validate_rows import RowReport, validate_rows
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.types import OnProgress, Problem


@dataclass(frozen=True)
class Question:
    """One row of the data set."""

    row: int  # its place, from 1
    problem: Problem


def validate_questions(shards: Path, share: ShareConfig | None, pairs: PairBuilder, on_row: OnProgress) -> RowReport:
    """Check which rows a teacher's prompt can be made of. Collective.

    Raises ValueError if none can, or if the student's format refuses a row that the teacher's accepts: what is sampled
    must not depend on who scores it.
    """

    def check(question: Question) -> None:
        with rejected_as(RejectReason.UNUSABLE_PROMPT):
            pairs.teacher.prompt(question.problem)
        pairs.check_problem(question.problem)

    return validate_rows(str(shards), read_questions(shards, share), check, on_row)


def read_questions(shards: Path, share: ShareConfig | None) -> Iterator[Question]:
    """All rows, or those of a share, in their order."""
    rows = None if share is None else share.rows(read_manifest(shards).num_rows)
    problems = scan_problems(shards, part=0, num_parts=1)
    return (
        Question(number, problem) for number, problem in enumerate(problems, start=1) if rows is None or number in rows
    )
