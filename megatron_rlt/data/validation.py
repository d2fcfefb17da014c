"""Converts the values of a source row to a `Problem`, or raises `UnusableRowError` with a named reason."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.conversations import parse_conversation
from megatron_rlt.data.rejection import RejectReason, UnusableRowError
from megatron_rlt.types import Problem
from megatron_rlt.visible_text import is_blank


class RowValidator:
    """Requires texts that are present, non-empty, valid UTF-8 and not too long, and unique ids: one per data set."""

    def __init__(self, columns: ColumnConfig, *, max_characters: int) -> None:
        self._columns, self._max_characters = columns, max_characters
        self._seen_ids: set[str] = set()
        self._made_ids: set[str] = set()  # of rows without one

    def problem(self, values: Mapping[str, object], *, position: int) -> Problem:
        """Validate one row; `position` (1-based, over all sources) replaces a missing id. Raises UnusableRowError."""
        columns = self._columns
        trace: str | None = None
        if values.get(columns.question) is None and values.get(columns.conversations) is not None:
            name = columns.conversations
            parsed = parse_conversation(values[name], name)
            question, solution = self._text(parsed.question, name), self._text(parsed.solution, name)
            trace = self._text(parsed.reasoning_trace, name)
        else:
            question = self._text(values.get(columns.question), columns.question)
            solution = self._text(values.get(columns.solution), columns.solution)
            if values.get(columns.reasoning_trace) is not None:
                trace = self._text(values[columns.reasoning_trace], columns.reasoning_trace)
            self._refuse_another(values, question, solution)
        return Problem(self._unique_id(values.get(columns.problem_id), position), question, solution, trace)

    def _refuse_another(self, values: Mapping[str, object], question: str, solution: str) -> None:
        """Raise UnusableRowError if a conversation beside question and solution holds others."""
        name = self._columns.conversations
        try:
            parsed = parse_conversation(values.get(name), name)
        except UnusableRowError:  # of another format, and not read
            return
        stated = {
            self._columns.question: (question, parsed.question),
            self._columns.solution: (solution, parsed.solution),
        }
        for column, (own, other) in stated.items():
            if own.strip() != other:
                raise UnusableRowError(RejectReason.AMBIGUOUS, column, f"column {name!r} holds another one")

    def _text(self, value: object, column: str) -> str:
        if value is None:
            raise UnusableRowError(RejectReason.MISSING, column, "absent or null")
        if not isinstance(value, str):
            raise UnusableRowError(RejectReason.WRONG_TYPE, column, f"{type(value).__name__} instead of text")
        if is_blank(value):
            raise UnusableRowError(RejectReason.EMPTY, column, "nothing but white space or invisible characters")
        if len(value) > self._max_characters:
            detail = f"{len(value)} characters, max_characters is {self._max_characters}"
            raise UnusableRowError(RejectReason.TOO_LONG, column, detail)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableRowError(RejectReason.NOT_UTF8, column, f"character {error.start}: {error.reason}") from error
        return value

    def _unique_id(self, value: object, position: int) -> str:
        column = self._columns.problem_id
        if value is None:
            problem_id = f"row-{position}"
        elif isinstance(value, int) and not isinstance(value, bool):
            problem_id = str(value)
        else:
            problem_id = self._text(value, column)
        if problem_id in self._seen_ids:
            made = ", which stands for the missing one," if value is None else ""
            first = " without an id" if problem_id in self._made_ids else ""
            detail = f"id {problem_id!r}{made} was used by an earlier row{first}"
            raise UnusableRowError(RejectReason.DUPLICATE_ID, column, detail)
        self._seen_ids.add(problem_id)
        if value is None:
            self._made_ids.add(problem_id)
        return problem_id
