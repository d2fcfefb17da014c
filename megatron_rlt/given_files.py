"""Reads the files that a user hands over; a fault is a ValueError that names the file, the rule and a remedy.

Several faults are a FaultsError, and `lines_of` gives the lines to print. In: a path. Out: its text, or the JSON
that it holds. What the values mean is left to the caller. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_rlt.visible_text import one_line

_REMEDY = "download or copy it again"


class FaultsError(ValueError):
    """Several faults of the user, one line each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.lines = tuple(one_line(fault) for fault in faults)
        super().__init__("\n".join(self.lines))


def lines_of(error: Exception) -> list[str]:
    """What an error says, one line per fault: a text that it quotes cannot begin a line of its own."""
    return list(error.lines) if isinstance(error, FaultsError) else [one_line(str(error))]


def read_text(path: Path, *, missing: str = _REMEDY, remedy: str = _REMEDY) -> str:
    """A file's UTF-8 text.

    Args:
        missing: what to do where there is no such file.
        remedy: what to do about any other fault.

    Raises:
        ValueError: no such file, a folder, not readable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; {missing}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a folder, not a file; {missing}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ValueError(f"{path}: cannot be read ({reason_of(error)}); {remedy}") from error


def read_json(path: Path, *, missing: str = _REMEDY, remedy: str = _REMEDY) -> Any:  # noqa: ANN401 - any JSON value
    """The JSON value that a file holds; raises ValueError as `read_text`, and for a file that is cut or no JSON."""
    text = read_text(path, missing=missing, remedy=remedy)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from error


def read_json_object(path: Path, *, missing: str = _REMEDY, remedy: str = _REMEDY) -> dict[str, Any]:
    """As `read_json` for a file that must hold one JSON object."""
    value = read_json(path, missing=missing, remedy=remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold one JSON object, holds a {type(value).__name__}; {remedy}")
    return value


def reason_of(error: Exception) -> str:
    """An error in a few words on one line, without the path that an OSError repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
