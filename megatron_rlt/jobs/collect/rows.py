"""The questions that `collect` explains: all rows of a data set once, in their order.

In: the data set and the teacher's format. Out: the rows a prompt can be made of. What is wrong with a row's text is
`data/`'s to find when a file is made into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.data.loader import scan_problems
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.data.rejection import RejectReason, UnusableRowError
from megatron_rlt.jobs.run.validate_rows import Survey, survey_rows
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.types import Problem


@dataclass(frozen=True)
class Question:
    """One row of the data set."""

    row: int  # its place, from 1
    problem: Problem


def open_shards(data: Path, work_dir: Path) -> Path:
    """The folder of shards; a file's are made below `work_dir` first. Collective; raises as `ensure_shards` does."""
    folder = data
    if dist.get_rank() == 0:
        folder = ensure_shards(data, work_dir)
    return broadcast_record(folder, source_rank=0, group=world())


def survey_questions(shards: Path, pairs: PairBuilder, on_row: Callable[[int], None]) -> Survey:
    """Which rows a teacher's prompt can be made of. Collective.

    Raises:
        ValueError: none can; or the student's format refuses a row that the teacher's accepts: what is sampled must
            not depend on who scores it.
    """

    def check(question: Question) -> None:
        try:
            pairs.teacher.prompt(question.problem)
        except ValueError as error:
            raise UnusableRowError(RejectReason.UNUSABLE_PROMPT, None, str(error)) from error
        pairs.check_problem(question.problem)

    return survey_rows(str(shards), _questions(shards), check, on_row)


def usable_questions(shards: Path, survey: Survey) -> Iterator[Question]:
    """The rows that passed, in their order."""
    rejected = {row.row for row in survey.rejected}
    return (question for question in _questions(shards) if question.row not in rejected)


def _questions(shards: Path) -> Iterator[Question]:
    problems = scan_problems(shards, part=0, num_parts=1)
    return (Question(number, problem) for number, problem in enumerate(problems, start=1))
