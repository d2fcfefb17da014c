"""A row's sequence is made once, as long as there is room for it."""

from __future__ import annotations

import pytest
import torch

from megatron_rlt.prompts.kept_sequences import KeptSequences
from megatron_rlt.types import Problem, Span, SpannedSequence


def test_rows_are_made_once_until_the_room_is_used() -> None:
    made: list[str] = []

    def make(problem: Problem) -> SpannedSequence:
        made.append(problem.question)
        length = len(problem.question)
        return SpannedSequence(torch.full((length,), ord(problem.question[0])), (Span(1, length),))

    sequence_of = KeptSequences(make, max_tokens=5)
    # Three tokens fit, four more do not, two do. The same id with another question is another row.
    rows = [Problem("1", "aaa", "s"), Problem("1", "bbbb", "s"), Problem("2", "cc", "s")]
    for _ in range(2):
        for row in rows:
            assert torch.equal(sequence_of(row).token_ids, make(row).token_ids)
            made.pop()
    assert made == ["aaa", "bbbb", "cc", "bbbb"]


def test_a_row_that_cannot_be_made_is_refused_every_time() -> None:
    def refuse(problem: Problem) -> SpannedSequence:
        raise ValueError(f"problem {problem.problem_id} is too long")

    sequence_of = KeptSequences(refuse, max_tokens=5)
    for _ in range(2):
        with pytest.raises(ValueError, match="problem 1 is too long"):
            sequence_of(Problem("1", "a", "s"))
