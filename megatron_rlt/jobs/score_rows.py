"""Which rows of `score`'s input can be scored: both prompt formats, and the models' longest sequences.

The pass over all rows is `row_survey`'s, reading and the rules on text are `data/`'s; what is too long is known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.data.rejection import RejectReason, UnusableRowError
from megatron_rlt.data.traces import Trace, read_traces
from megatron_rlt.jobs.row_survey import Survey
from megatron_rlt.prompts.pairs import PairBuilder


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


def usable_traces(file: Path, survey: Survey) -> Iterator[Trace]:
    """The rows that passed, in their order."""
    rejected = {row.row for row in survey.rejected}
    return (row for row in read_traces(file) if isinstance(row, Trace) and row.row not in rejected)
