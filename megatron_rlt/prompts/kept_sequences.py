"""Sequences of rows that come again, so that a small data set's text is encoded once and not once an epoch.

In: what makes a sequence of a row. Out: the same sequences. Leaves to others: how a sequence is made.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rlt.types import Problem, SpannedSequence


class KeptSequences:
    """Calls `make` for rows it has not kept. Rows are kept as they come, until `max_tokens` tokens are."""

    def __init__(self, make: Callable[[Problem], SpannedSequence], *, max_tokens: int) -> None:
        self._make = make
        self._tokens_left = max_tokens
        self._kept: dict[Problem, SpannedSequence] = {}

    def __call__(self, problem: Problem) -> SpannedSequence:
        """The row's sequence; raises what `make` raises."""
        kept = self._kept.get(problem)
        if kept is not None:
            return kept
        sequence = self._make(problem)
        if len(sequence) <= self._tokens_left:
            self._kept[problem] = sequence
            self._tokens_left -= len(sequence)
        return sequence
