"""Which rows of `score`'s input can be scored: every row is seen before a model loads.

In: the input file, both prompt formats and the models' longest sequences. Out: how many rows are usable, and the
rejected ones with row and reason. Reading and the rules on text are `data/`'s; what is too long is known here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.data.prepare import describe_counts
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError
from megatron_rlt.data.traces import Trace, read_traces
from megatron_rlt.prompts.pairs import PairBuilder

_NUM_SHOWN = 3


@dataclass(frozen=True)
class Survey:
    """What a pass over all rows found; the same on every rank."""

    num_usable: int
    rejected: tuple[RejectedRow, ...]  # in the input's order

    @property
    def counts(self) -> dict[str, int]:
        """Rejected rows by reason."""
        return dict(Counter(rejected.reason.value for rejected in self.rejected))

    def describe_rejected(self, file: Path) -> str:
        """How many rows were rejected and why, in words; `file` lists them."""
        if not self.rejected:
            return "none rejected"
        return f"{len(self.rejected)} rejected ({describe_counts(self.counts)}), listed in {file}"


@dataclass(frozen=True, eq=False)
class LengthCheck:
    """Whether both models can read what becomes of a trace."""

    pairs: PairBuilder
    max_teacher_tokens: int
    max_student_tokens: int

    def __call__(self, trace: Trace) -> None:
        """Raise UnusableRowError for a row that no prompt can be made of, or that is too long for a model."""
        try:
            pair = self.pairs.pair_from_text(trace.problem, trace.explanation)
        except ValueError as error:
            raise UnusableRowError(RejectReason.UNUSABLE_PROMPT, None, str(error)) from error
        lengths = (
            ("teacher", len(pair.teacher), self.max_teacher_tokens),
            ("student", len(pair.student), self.max_student_tokens),
        )
        for name, length, limit in lengths:
            if length > limit:
                detail = f"the {name}'s sequence has {length} tokens, its model reads {limit} at most"
                raise UnusableRowError(RejectReason.TOO_LONG, None, detail)


def survey_rows(file: Path, check: Callable[[Trace], None], on_row: Callable[[int], None]) -> Survey:
    """Look at every row; the ranks share the costly check. Collective on the whole job.

    Args:
        check: raises UnusableRowError.
        on_row: called with a row's number.

    Raises:
        ValueError: the file cannot be read, or none of its rows is usable.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    unreadable: list[RejectedRow] = []
    mine: list[RejectedRow] = []
    num_traces = 0
    for row in read_traces(file):
        on_row(row.row)
        if isinstance(row, RejectedRow):
            unreadable.append(row)
            continue
        if num_traces % world_size == rank:
            try:
                check(row)
            except UnusableRowError as error:
                mine.append(RejectedRow(str(file), row.row, error.reason, error.column, error.detail))
        num_traces += 1
    everyone: list[list[RejectedRow]] = [[]] * world_size
    dist.all_gather_object(everyone, mine)
    refused = [rejected for part in everyone for rejected in part]
    rejected = tuple(sorted([*unreadable, *refused], key=lambda rejected: rejected.row))
    survey = Survey(num_traces - len(refused), rejected)
    _require_rows(file, survey)
    return survey


def usable_traces(file: Path, survey: Survey) -> Iterator[Trace]:
    """The rows that passed, in their order."""
    rejected = {row.row for row in survey.rejected}
    return (row for row in read_traces(file) if isinstance(row, Trace) and row.row not in rejected)


def write_rejected(file: Path, survey: Survey) -> None:
    """One JSON line a rejected row, also none; what an earlier start wrote is replaced by the same."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in survey.rejected), encoding="utf-8")
    temporary.replace(file)


def _require_rows(file: Path, survey: Survey) -> None:
    if survey.num_usable > 0:
        return
    if not survey.rejected:
        raise ValueError(f"no usable row in {file}: it has no rows")
    quoted = "".join(f"\n  {rejected}" for rejected in survey.rejected[:_NUM_SHOWN])
    raise ValueError(
        f"no usable row in {file}: all {len(survey.rejected)} rows were rejected "
        f"({describe_counts(survey.counts)}); mend them{quoted}"
    )
