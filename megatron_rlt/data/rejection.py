"""Why a source row is unusable: named reasons, and the record that `rejected.jsonl` is made of.

Reading and validating a row raise or yield these; nobody drops a row without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RejectReason(StrEnum):
    """The kinds of bad row; the names appear in `rejected.jsonl` and in the printed counts."""

    NOT_UTF8 = "not_utf8"  # bytes that are no UTF-8, or a lone surrogate that cannot be written as UTF-8
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"  # valid JSON, but no {"column": value} object
    MISSING = "missing"  # column absent or null
    EMPTY = "empty"  # nothing but white space
    WRONG_TYPE = "wrong_type"
    TOO_LONG = "too_long"
    DUPLICATE_ID = "duplicate_id"
    UNUSABLE_PROMPT = "unusable_prompt"  # no prompt can be made of it: too many tokens, or text of a special token
    UNREADABLE_ANSWER = "unreadable_answer"  # no answer could be judged by the reference answer
    BAD_CONVERSATION = "bad_conversation"  # turns or markers are not those of a Bespoke-Stratos row


@dataclass(frozen=True)
class RejectedRow:
    """One source row that was not used."""

    file: str
    row: int  # 1-based
    reason: RejectReason
    column: str | None  # None: the whole row
    detail: str

    def __str__(self) -> str:
        column = "" if self.column is None else f" in column {self.column!r}"
        return f"{self.file} row {self.row}: {self.reason}{column}: {self.detail}"


class UnusableRowError(Exception):
    """Raised while one row is validated; the caller, who knows file and row, makes it a `RejectedRow`."""

    def __init__(self, reason: RejectReason, column: str | None, detail: str) -> None:
        super().__init__(f"{reason} in {column!r}: {detail}")
        self.reason = reason
        self.column = column
        self.detail = detail
