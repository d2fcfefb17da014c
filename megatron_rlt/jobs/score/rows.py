"""Which rows of `score`'s input can be scored: both prompt formats, and the models' longest sequences.

The pass over all rows is `row_survey`'s, reading and the rules on text are `data/`'s; what is too long is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlt.config.sections import Placebo
from megatron_rlt.data.rejection import RejectReason, UnusableRowError
from megatron_rlt.data.traces import Trace, read_traces
from megatron_rlt.jobs.reward.placebos import placebo_ids, placebo_pair
from megatron_rlt.jobs.run.validate_rows import Survey
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.placebo import other_questions
from megatron_rlt.rollout.sampling import completion_seed
from megatron_rlt.types import ScoringPair


@dataclass(frozen=True, eq=False)
class TracePairs:
    """The pair that is scored for a trace: of its explanation, or of a placebo in its place."""

    pairs: PairBuilder
    placebo: Placebo
    seed: int
    others: Mapping[int, str]  # by a trace's row: another question's explanation; only for `other_question`

    def __call__(self, trace: Trace) -> ScoringPair:
        """Raise ValueError for a row that no prompt can be made of."""
        own = self.pairs.pair_from_text(trace.problem, trace.explanation)
        other = self.others.get(trace.row)
        ids = placebo_ids(
            self.placebo,
            own.explanation_ids,
            seed=completion_seed(self.seed, 0, trace.row, 0),
            other_ids=None
            if other is None
            else torch.tensor(self.pairs.teacher.tokenizer.encode(other), dtype=torch.int64),
        )
        return placebo_pair(self.pairs, own, ids)


def trace_pairs(file: Path, pairs: PairBuilder, *, placebo: Placebo, seed: int) -> TracePairs:
    """Pairs for the rows of a file; `other_question` keeps all its explanations in memory.

    Raises:
        ValueError: the file cannot be read, or there is no other question.
    """
    others: dict[int, str] = {}
    if placebo == "other_question":
        traces = [row for row in read_traces(file) if isinstance(row, Trace)]
        places = other_questions([trace.problem.question for trace in traces], seed=seed)
        others = {trace.row: traces[place].explanation for trace, place in zip(traces, places, strict=True)}
    return TracePairs(pairs, placebo, seed, others)


@dataclass(frozen=True, eq=False)
class LengthCheck:
    """Whether both models can read what becomes of a trace."""

    pairs: TracePairs
    max_teacher_tokens: int
    max_student_tokens: int

    def __call__(self, trace: Trace) -> None:
        """Raise UnusableRowError for a row that no prompt can be made of, or that is too long for a model."""
        try:
            pair = self.pairs(trace)
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
