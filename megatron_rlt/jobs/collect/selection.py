"""Which explanations of a question become training rows: a choice by form, length and reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_rlt.config.commands.collect import SelectionConfig


@dataclass(frozen=True)
class Candidate:
    """What selection needs to know of one explanation."""

    reward: float | None  # None: it has none
    student_tokens: int  # of the whole student sequence
    well_formed: bool
    is_blank: bool = False  # nothing but white space: no training row can be made of it


class Note(StrEnum):
    """What a selection had to accept on a question; the texts are for people."""

    LEFT_OUT = "left out: no explanation may be used"
    MALFORMED = "malformed explanation taken: none is well-formed"
    TOO_LONG = "too long an explanation taken: none fits"
    NO_REWARD = "first explanation taken: none has a reward"


@dataclass(frozen=True)
class Choice:
    """One question's selection."""

    indices: tuple[int, ...]  # of the chosen explanations, ascending
    notes: frozenset[Note]


def select(candidates: Sequence[Candidate], selection: SelectionConfig) -> Choice:
    """Choose among one question's explanations, of equal rewards the earlier, those without a reward last.

    Form comes first: with `malformed: last_resort` a malformed one is chosen only where none is well-formed.
    """
    notes: set[Note] = set()
    eligible = [index for index, candidate in enumerate(candidates) if not candidate.is_blank]
    well_formed = [index for index in eligible if candidates[index].well_formed]
    if selection.malformed == "never" or (selection.malformed == "last_resort" and well_formed):
        eligible = well_formed
    elif selection.malformed == "last_resort" and eligible:
        notes.add(Note.MALFORMED)
    if not eligible:
        return Choice((), frozenset({Note.LEFT_OUT}))
    limit = selection.max_student_tokens
    if limit is not None:
        fitting = [index for index in eligible if candidates[index].student_tokens <= limit]
        if not fitting:
            notes.add(Note.TOO_LONG)
        eligible = fitting or eligible
    if selection.rule == "all":
        return Choice(tuple(eligible), frozenset(notes))
    if selection.rule == "first":
        return Choice((eligible[0],), frozenset(notes))
    best = _best(candidates, eligible)
    if best is None:
        notes.add(Note.NO_REWARD)
    return Choice((eligible[0] if best is None else best,), frozenset(notes))


def _best(candidates: Sequence[Candidate], eligible: Sequence[int]) -> int | None:
    """The index with the highest reward, the first of equals; None where none has one."""
    rewards = {index: reward for index in eligible if (reward := candidates[index].reward) is not None}
    return max(rewards, key=lambda index: rewards[index], default=None)
