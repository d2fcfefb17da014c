"""The keys of one Hugging Face `config.json`, each read as the type that it must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_rlt.given_files import read_json_object

_CORRECT = "correct config.json"
_MOST_NUMBER = 1e30  # float32 has to hold it, and products with it
_MOST = 2**31  # no size of a model is above it, and rules that try all divisors must end


@dataclass(frozen=True)
class HfConfig:
    """The keys of one config.json; every complaint names the file."""

    source: Path
    keys: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: Path) -> HfConfig:
        """Read the file. Raises ValueError if it is not there or no JSON object."""
        source = folder / "config.json"
        missing = "the model must be a Hugging Face folder with a config.json"
        return cls(source, read_json_object(source, missing=missing, remedy="download the folder again"))

    def fail(self, what: str, remedy: str = _CORRECT) -> NoReturn:
        """Raise ValueError with the file, the rule and the remedy."""
        raise ValueError(f"{self.source}: {what}; {remedy}")

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self.keys.get(key) is not None

    def integer(self, key: str) -> int:
        """A required positive integer."""
        return self.positive_integer(key, self._required(key))

    def number(self, key: str) -> float:
        """A required positive number."""
        return self.positive_number(key, self._required(key))

    def flag(self, key: str) -> bool:
        """True or false; a key that is absent or null is false, as for transformers."""
        value = self.keys.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{key} must be true or false, got {shown(value)}")
        return bool(value)

    def section(self, key: str) -> dict[str, Any]:
        """An object of plain values; empty where the key is absent or null."""
        value = self.keys.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.fail(f"{key} must be an object with keys and values, got {shown(value)}")
        nested = [name for name, inner in value.items() if isinstance(inner, dict)]
        if nested:
            self.fail(f"{key}.{nested[0]} must be no object: values by kind of layer are not supported")
        return dict(value)

    def positive_integer(self, key: str, value: object) -> int:
        """`value` of `key`, checked."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
            self.fail(f"{key} must be a positive integer, got {shown(value)}")
        return value

    def positive_number(self, key: str, value: object) -> float:
        """`value` of `key`, checked."""
        if not is_finite_number(value) or not 0 < value < _MOST_NUMBER:  # type: ignore[operator]
            self.fail(f"{key} must be a positive number, got {shown(value)}")
        return float(value)  # type: ignore[arg-type]

    def _required(self, key: str) -> Any:  # noqa: ANN401 - any JSON value
        if key not in self.keys:
            self.fail(f"key {key!r} is missing", "use a complete Hugging Face folder")
        return self.keys[key]


def stop_ids(source: Path, keys: Mapping[str, Any]) -> frozenset[int]:
    """`eos_token_id` of a file's keys, one id or several; empty without the key.

    Raises ValueError for anything else under it.
    """
    declared = keys.get("eos_token_id")
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    wrong = [one for one in listed if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < _MOST]
    if wrong:
        raise ValueError(f"{source}: eos_token_id must be token ids, got {shown(wrong[0])}; correct the file")
    return frozenset(listed)


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number that float64 holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """A value as Python writes it, cut to one short line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
