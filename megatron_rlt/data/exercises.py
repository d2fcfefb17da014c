"""Reads questions with a reference answer: rows `id, question, answer`, plus the columns of choices or countdown.

Yields one `Exercise` or `RejectedRow` per row of a file or hub data set. Callers check prompt lengths and answers.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from megatron_rlt.config.commands.evaluation_sets import QuestionColumnConfig
from megatron_rlt.config.commands.job import AnswerKind
from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError
from megatron_rlt.data.rows import convert_rows, read_columns, require_named
from megatron_rlt.data.validation import RowValidator
from megatron_rlt.types import Problem
from megatron_rlt.visible_text import is_blank

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
StateCountdown = Callable[[Sequence[int], int, bool | None, object], str]
"""(numbers, target, whether all must be used, question), the last two None if absent -> the task in words."""


@dataclass(frozen=True)
class Exercise:
    """A question and its reference answer."""

    row: int  # 1-based in its source
    problem: Problem  # its solution is the reference answer; for multiple choice, the letter
    choices: tuple[str, ...]  # in letter order; empty if the question itself lists them, or has none


def read_exercises(
    source: str, kind: AnswerKind, columns: QuestionColumnConfig, *, state_countdown: StateCountdown
) -> Iterator[Exercise | RejectedRow]:
    """Read every row of a source. Raises ValueError if it cannot be read at all or lacks a column.

    `state_countdown` words the task of a countdown row that has numbers and a target.
    """
    reader = _ExerciseReader(kind, columns, state_countdown)
    rows = read_columns(source, partial(_wanted_columns, source, kind, columns), streaming=False)
    return convert_rows(
        require_named(rows, columns.named, f"data {source!r}"), lambda row: reader.exercise(row.values, row.row)
    )


class _ExerciseReader:
    """Applies the rules of an answer kind, then the rules of `prepare`."""

    def __init__(self, kind: AnswerKind, columns: QuestionColumnConfig, state_countdown: StateCountdown) -> None:
        self._kind, self._columns, self._state_countdown = kind, columns, state_countdown
        plain = ColumnConfig(question=columns.question, solution=columns.answer, problem_id=columns.problem_id)
        self._validator = RowValidator(plain, max_characters=sys.maxsize)

    def exercise(self, values: Mapping[str, object], row: int) -> Exercise:
        """Build one exercise; raises UnusableRowError."""
        columns = self._columns
        question, answer = values.get(columns.question), _as_text(values.get(columns.answer))
        choices: tuple[str, ...] = ()
        if self._kind == "choice":
            choices = self._choices(values)
            answer = _letter(answer, choices, columns.answer)
        if self._kind == "countdown" and values.get(columns.numbers) is not None:
            # Judged by the columns, whatever the question's wording is taken for.
            answer = self._state_countdown(*self._task(values), question)
            question = answer if question is None else question
        cells = {columns.question: question, columns.answer: answer, columns.problem_id: values.get(columns.problem_id)}
        return Exercise(row, self._validator.problem(cells, position=row), choices)

    def _choices(self, values: Mapping[str, object]) -> tuple[str, ...]:
        """Choices in letter order; a row with separate wrong answers gets a shuffle seeded by its question."""
        columns = self._columns
        if columns.wrong_answers:
            named = [_required_text(values, name) for name in (columns.answer, *columns.wrong_answers)]
            question = _required_text(values, columns.question)
            _require_different(named, columns.answer)
            order = random.Random(hashlib.sha256(question.encode("utf-8", "replace")).digest())
            return tuple(order.sample(named, len(named)))
        listed = values.get(columns.choices)
        if listed is None:
            return ()
        texts = [_as_text(choice) for choice in listed] if isinstance(listed, list) else []
        choices = tuple(text for text in texts if isinstance(text, str) and not is_blank(text))
        if not 2 <= len(choices) <= len(_LETTERS) or len(choices) != len(texts):
            detail = f"{str(listed)[:80]!r} instead of a list of 2 to {len(_LETTERS)} texts"
            raise UnusableRowError(RejectReason.WRONG_TYPE, columns.choices, detail)
        _require_different(choices, columns.choices)
        return choices

    def _task(self, values: Mapping[str, object]) -> tuple[list[int], int, bool | None]:
        numbers, target = values[self._columns.numbers], values.get(self._columns.target)
        if not isinstance(numbers, list) or not numbers or not all(_is_whole(number) for number in numbers):
            detail = f"{str(numbers)[:80]!r} instead of a list of whole numbers"
            raise UnusableRowError(RejectReason.WRONG_TYPE, self._columns.numbers, detail)
        if not _is_whole(target):
            detail = f"{str(target)[:80]!r} instead of a whole number"
            raise UnusableRowError(RejectReason.WRONG_TYPE, self._columns.target, detail)
        assert isinstance(target, int)
        use_all = values.get(self._columns.use_all)
        if not isinstance(use_all, bool | None):
            detail = f"{str(use_all)[:80]!r} instead of true or false"
            raise UnusableRowError(RejectReason.WRONG_TYPE, self._columns.use_all, detail)
        return numbers, target, use_all


def _as_text(value: object) -> object:
    """Format numbers as text without an exponent; return any other value unchanged."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return f"{Decimal(repr(value)):f}" if isinstance(value, float) and math.isfinite(value) else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _required_text(values: Mapping[str, object], column: str) -> str:
    value = _as_text(values.get(column))
    if isinstance(value, str) and not is_blank(value):
        return value
    reason = RejectReason.MISSING if value is None else RejectReason.WRONG_TYPE
    raise UnusableRowError(reason, column, f"{str(value)[:80]!r} instead of text")


def _require_different(choices: Sequence[str], column: str) -> None:
    """Raise UnusableRowError if two choices are one text."""
    twice = next((text for place, text in enumerate(choices) if text.strip() in map(str.strip, choices[:place])), None)
    if twice is not None:
        raise UnusableRowError(RejectReason.AMBIGUOUS, column, f"the choice {twice[:80]!r} stands twice")


def _letter(answer: object, choices: Sequence[str], column: str) -> object:
    """Letter of an answer given as a letter or as the text of a choice; unchanged if there are no choices."""
    if not choices or not isinstance(answer, str):
        return answer
    letter = answer.strip().upper()
    if answer in choices and letter in _LETTERS[: len(choices)] and len(letter) == 1:
        if choices.index(answer) == _LETTERS.index(letter):
            return letter
        detail = f"{answer!r} is the letter of one choice and the text of another"
        raise UnusableRowError(RejectReason.AMBIGUOUS, column, detail)
    if letter in _LETTERS[: len(choices)] and len(letter) == 1 and answer not in choices:
        return letter
    if choices.count(answer) == 1:
        return _LETTERS[choices.index(answer)]
    detail = f"{answer[:80]!r} is neither a letter up to {_LETTERS[len(choices) - 1]} nor the text of one choice"
    raise UnusableRowError(RejectReason.UNREADABLE_ANSWER, column, detail)


def _wanted_columns(source: str, kind: AnswerKind, columns: QuestionColumnConfig, present: list[str]) -> list[str]:
    """Columns to read; raises ValueError if no row could be used."""
    needed = {columns.question, columns.answer, *(columns.wrong_answers if kind == "choice" else ())}
    states_task = kind == "countdown" and {columns.numbers, columns.target} <= set(present)
    missing = sorted(needed - set(present))
    if missing and not states_task:
        raise ValueError(
            f"data {source!r} lacks the columns {', '.join(missing)} and has {', '.join(present)}; name yours under"
            " `columns`"
        )
    if lost := sorted(columns.named - set(present)):
        raise ValueError(
            f"data {source!r} lacks the columns {', '.join(lost)} that `columns` names, and has {', '.join(present)};"
            " correct the names"
        )
    optional = {columns.problem_id, columns.choices, columns.numbers, columns.target, columns.use_all}
    return [name for name in present if name in needed | optional]
