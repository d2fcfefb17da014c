"""A data position as JSON: the tree of energon's state classes, each value with what JSON lacks named beside it.

Energon's own way to store it is pickle, which runs code when it is read; here a reader makes nothing but the classes
below, from plain values.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}
_MAX_DEPTH = 100  # energon's states are nested by 20 at most


def state_from_json(value: Any) -> Any:  # noqa: ANN401 - a state of energon's loader
    """The inverse of `state_to_json`. Raises ValueError for anything else."""
    try:
        return _decoded(value, 0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no position of a loader ({type(error).__name__}: {error})") from error


def state_to_json(value: Any) -> Any:  # noqa: ANN401 - any value of a state
    """A state of energon's loader as JSON values; what is none of them becomes `{its kind: content}`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [state_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [state_to_json(item) for item in value]}
    if isinstance(value, dict):
        kind = "state" if isinstance(value, FlexState) else "dict"
        assert all(isinstance(key, str) for key in value), "keys of energon's states are names"
        return {kind: {key: state_to_json(item) for key, item in value.items()}}
    if isinstance(value, bytes):
        return {"bytes": _text_of(value)}
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.uint8, f"a generator's state is bytes, not {value.dtype}"
        return {"tensor": _text_of(value.numpy().tobytes())}
    if isinstance(value, np.ndarray):
        assert value.dtype == np.uint32, f"a generator's state is 32-bit words, not {value.dtype}"
        return {"words": _text_of(value.astype("<u4").tobytes())}
    name = type(value).__name__
    assert _RECORDS.get(name) is type(value), f"energon's state holds a {type(value)}, which has no form in JSON"
    return {name: {field.name: state_to_json(getattr(value, field.name)) for field in fields(_RECORDS[name])}}


def _decoded(value: Any, depth: int) -> Any:  # noqa: ANN401 - any value of a state
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested by more than {_MAX_DEPTH}")
    if isinstance(value, list):
        return [_decoded(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _LEAVES:
        return _LEAVES[kind](base64.b64decode(content, validate=True))
    if kind == "tuple":
        return tuple(_decoded(item, depth + 1) for item in content)
    named = {key: _decoded(item, depth + 1) for key, item in content.items()}
    if kind == "dict":
        return named
    return FlexState(named) if kind == "state" else _RECORDS[kind](**named)


def _text_of(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


_LEAVES: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "tensor": lambda content: torch.frombuffer(bytearray(content), dtype=torch.uint8),
    "words": lambda content: np.frombuffer(content, dtype="<u4").astype(np.uint32),
}
