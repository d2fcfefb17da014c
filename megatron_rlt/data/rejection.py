"""Reasons why a source row is unusable, and the record written to `rejected.jsonl`. No row is dropped without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class RejectReason(StrEnum):
    """Reasons for rejecting a row, as they appear in `rejected.jsonl` and in the printed counts."""

    NOT_UTF8 = "not_utf8"  # bytes that are no UTF-8, or a lone surrogate that cannot be written as UTF-8
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"  # valid JSON, but no {"column": value} object
    MISSING = "missing"  # column absent or null
    EMPTY = "empty"  # nothing that can be seen
    WRONG_TYPE = "wrong_type"
    TOO_LONG = "too_long"
    DUPLICATE_ID = "duplicate_id"
    UNUSABLE_PROMPT = "unusable_prompt"  # too many tokens, or text of a special token
    UNREADABLE_ANSWER = "unreadable_answer"  # the reference answer cannot be used for judging
    AMBIGUOUS = "ambiguous"  # one fact stated twice, and not the same
    BAD_CONVERSATION = "bad_conversation"  # turns or markers differ from Bespoke-Stratos rows


@dataclass(frozen=True)
class RejectedRow:
    """One rejected source row."""

    file: str
    row: int  # 1-based
    reason: RejectReason
    column: str | None  # None: the whole row
    detail: str

    def __str__(self) -> str:
        column = "" if self.column is None else f" in column {self.column!r}"
        return f"{self.file} row {self.row}: {self.reason}{column}: {self.detail}"


class UnusableRowError(Exception):
    """Raised while validating one row; `rejected` adds the file and row that only the caller knows."""

    def __init__(self, reason: RejectReason, column: str | None, detail: str) -> None:
        super().__init__(f"{reason} in {column!r}: {detail}")
        self.reason, self.column, self.detail = reason, column, detail

    def rejected(self, file: str, row: int) -> RejectedRow:
        return RejectedRow(file, row, self.reason, self.column, self.detail)


@contextmanager
def rejected_as(reason: RejectReason) -> Iterator[None]:
    """Re-raise a ValueError of the block as UnusableRowError with this reason."""
    try:
        yield
    except ValueError as error:
        raise UnusableRowError(reason, None, str(error)) from error
