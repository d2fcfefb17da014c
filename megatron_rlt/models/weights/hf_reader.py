"""Reads slices of tensors from a Hugging Face folder's safetensors files into the caller's tensors.

Names, shapes and dtypes are checked from the files' headers before any weight is read. `load` chooses the slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rlt.config.weight_files import INDEX_FILE, SINGLE_FILE, weight_index

_FLOAT_DTYPES = ("F32", "BF16", "F16")  # 8-bit and integer tensors would need scales
_ROTARY_BUFFER = ".rotary_emb.inv_freq"  # older Llama folders store it; the model computes it
_MAX_NAMED = 8  # names per line of an error; a wrong folder would list thousands


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor's file and header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...


@dataclass(frozen=True, eq=False)
class SliceRead:
    """Copy `[start, stop)` along `dim` of a stored tensor into `target`, which has the same number of elements."""

    name: str
    dim: int
    start: int
    stop: int
    target: Tensor


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of the folder without reading values.

    Raises:
        ValueError: no safetensors, a file of the index is missing or damaged, or no file holds a tensor of the index.
    """
    index = weight_index(folder)
    if index is None:
        return _file_headers(folder / SINGLE_FILE)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        headers = _file_headers(folder / file)
        stored.update({name: header for name, header in headers.items() if index.get(name, file) == file})
    lost = [name for name in index if name not in stored]
    if lost:
        raise ValueError(
            f"{folder}: {INDEX_FILE} names tensors that their files do not hold: {_some(lost)}; "
            "download the folder again"
        )
    return stored


def check_census(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    unused: Iterable[str],
    description: str = "config.json",
) -> None:
    """Compare the folder's tensors with those that the model needs; one error names all differences.

    Args:
        expected: shape of every tensor that the model reads, by name.
        description: what says which model it is.
        unused: names that may exist without being read; rotary buffers always may.

    Raises:
        ValueError: tensors are missing, surplus, of another shape or not floating point of 16 or 32 bits.
    """
    known = {*expected, *unused}
    missing = [name for name in expected if name not in stored]
    surplus = [name for name in sorted(stored) if name not in known and not name.endswith(_ROTARY_BUFFER)]
    present = {name: stored[name] for name in expected if name in stored}
    shapes = [
        f"{name} is {list(tensor.shape)}, not {list(expected[name])}"
        for name, tensor in present.items()
        if tensor.shape != expected[name]
    ]
    dtypes = [f"{name} is {tensor.dtype}" for name, tensor in present.items() if tensor.dtype not in _FLOAT_DTYPES]
    other_dtypes = f"dtypes other than {', '.join(_FLOAT_DTYPES)}"
    lists = {"missing tensors": missing, "surplus tensors": surplus, "wrong shapes": shapes, other_dtypes: dtypes}
    faults = [f"{title} ({len(names)}): {_some(names)}" for title, names in lists.items() if names]
    if faults:
        raise ValueError(
            f"{folder}: the weights do not fit the model that {description} describes. {'. '.join(faults)}. Use a "
            f"complete, unquantised folder whose {description} belongs to its weights (adapters merged)"
        )


def copy_slices(stored: Mapping[str, StoredTensor], reads: Iterable[SliceRead]) -> None:
    """Fill every target, file by file, cast to the target's dtype and moved to its device.

    Raises:
        ValueError: a slice holds a value that is not finite.
    """
    by_file: dict[Path, list[SliceRead]] = {}
    for read in reads:
        by_file.setdefault(stored[read.name].file, []).append(read)
    for file in sorted(by_file):
        with safe_open(file, framework="pt") as tensors:
            for read in by_file[file]:
                part = tensors.get_slice(read.name)
                chosen = slice(read.start, read.stop)
                values = part[chosen] if read.dim == 0 else part[:, chosen]
                with torch.no_grad():
                    read.target.copy_(values.reshape(read.target.shape))
                    _require_finite(read.target, read.name, file)


def _require_finite(values: Tensor, name: str, file: Path) -> None:
    num_broken = values.numel() - int(values.isfinite().sum())
    if num_broken:
        raise ValueError(
            f"{file}: {name} holds {num_broken} values that are not finite (NaN or infinite), and so would be the"
            " model's logits; take weights from before they broke, or download the folder again"
        )


def _file_headers(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise ValueError(f"{file}: named by {INDEX_FILE} but not there; download the folder again")
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dictionary
            return {name: StoredTensor(file, tuple(one.get_shape()), one.get_dtype()) for name, one in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or cut short ({error}); download the folder again") from error


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:_MAX_NAMED])
    return listed if len(names) <= _MAX_NAMED else f"{listed} and {len(names) - _MAX_NAMED} more"
