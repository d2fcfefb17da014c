"""A cache of encoded rows, so that a small data set is tokenized once and not once per epoch."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rlt.types import Problem, SpannedSequence


class KeptSequences:
    """Calls `make` for rows that are not cached; caches rows first come, first served, up to `max_tokens` tokens."""

    def __init__(self, make: Callable[[Problem], SpannedSequence], *, max_tokens: int) -> None:
        self._make = make
        self._tokens_left = max_tokens
        self._kept: dict[Problem, SpannedSequence] = {}

    def __call__(self, problem: Problem) -> SpannedSequence:
        """Return the row's sequence; raises what `make` raises."""
        kept = self._kept.get(problem)
        if kept is not None:
            return kept
        sequence = self._make(problem)
        if len(sequence) <= self._tokens_left:
            self._kept[problem] = sequence
            self._tokens_left -= len(sequence)
        return sequence
