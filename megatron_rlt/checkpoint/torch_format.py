"""Reads torch's distributed checkpoints as data: nothing that stands in them is run. Names what their disk refuses.

Torch unpickles `.metadata` and saved objects, and a pickle calls what it names. Here `.metadata` may name only the
classes below, objects are neither saved nor loaded, and torch's weights-only reader reads tensors and common state.
"""

from __future__ import annotations

import errno
import io
import pathlib
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load_state_dict

from megatron_rlt.disk_faults import DiskError, free_bytes, refusal

_TENSOR_FILE = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
_ALLOWED: dict[tuple[str, str], object] = {
    **{
        (metadata.__name__, record.__name__): record
        for record in (
            metadata.Metadata,
            metadata.StorageMeta,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.TensorProperties,
            metadata.ChunkStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
}
# What content of unexpected shape raises in readers that check little, such as Megatron's of optimizers.
_OF_CONTENT = (KeyError, TypeError, AttributeError, IndexError, AssertionError, OverflowError, RuntimeError)
# What this machine and its ranks raise, whatever the content: no sign of damage.
_OF_MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError, MemoryError)
# What torch says where a file that it opened itself could not be written; the number of the error is lost.
_WRITE_FAILURES = ("PytorchStreamWriter failed", "file write failed", "iostream error", "inline_container")


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the names of `_ALLOWED` and no others, and so calls nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401 - as the base class
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint needs")
        return _ALLOWED[module_name, global_name]


def read_metadata(file: Path) -> metadata.Metadata:
    """Read a `.metadata` file. Raises ValueError unless it describes tensors in files beside it, and nothing else."""
    try:
        found = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        fault = _fault(found)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly anything
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        raise ValueError(f"{file} is not the metadata of a checkpoint of this program ({fault}): nothing in it was run")
    assert isinstance(found, metadata.Metadata)
    return found


def _fault(found: object) -> str | None:
    if not isinstance(found, metadata.Metadata):
        return f"it holds a {type(found).__name__}"
    for key, stored in found.state_dict_metadata.items():
        if not isinstance(stored, metadata.TensorStorageMetadata):
            return f"{key!r} is an object, not a tensor"
    for place in found.storage_data.values():
        if not isinstance(place, filesystem._StorageInfo) or not _TENSOR_FILE.fullmatch(place.relative_path):
            return "a tensor lies outside its folder"
        if place.transform_descriptors:
            return "a tensor is stored in another form"
    return None


class _Reader(filesystem.FileSystemReader):
    def read_metadata(self, *_args: object, **_options: object) -> metadata.Metadata:
        found = read_metadata(Path(self.path) / ".metadata")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(MCoreLoadPlanner):  # type: ignore[misc]  # untyped package
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:  # noqa: ANN401, ARG002 - as the base class
        raise ValueError("a checkpoint holds tensors only, and no object is read from it")


class DataOnlyLoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]  # untyped package
    """Megatron's loader of tensors, with a reader that runs nothing. It uses private helpers of the pinned version."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        by_key, flat_mapping, renaming = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(by_key, True)
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        planner = _Planner(
            shapes_validation_sharded_tensors=[one for one in tensors if not one.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={one.key: one for one in tensors if one.allow_shape_mismatch},
        )
        load_state_dict(state, _Reader(checkpoint_dir), planner=planner)
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, renaming)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Any = None) -> dict[str, Any]:  # noqa: ANN401
        found = read_metadata(Path(checkpoint_dir) / ".metadata") if metadata is None else metadata
        tensors: dict[str, Any] = super().load_tensors_metadata(checkpoint_dir, found)
        return tensors

    def load_sharded_metadata(self, checkpoint_dir: Path) -> dict[str, Any]:
        return self.load_tensors_metadata(checkpoint_dir)


class DataOnlyCommonStrategy(TorchCommonLoadStrategy):  # type: ignore[misc]  # untyped package
    """Reads the common state as data, whatever torch's environment variables say."""

    def load_common(self, checkpoint_dir: Path) -> dict[str, Any]:
        file = Path(checkpoint_dir) / COMMON_STATE_FNAME
        return dict(load_plain(file.read_bytes(), file))

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Path) -> dict[str, Any]:  # noqa: ANN401, ARG002
        assert not sharded_objects_state_dict, "objects are neither saved nor loaded"
        return {}


def load_plain(content: bytes, source: Path) -> Any:  # noqa: ANN401 - tensors and plain values
    """What torch saved, if it is tensors and plain values. Raises ValueError, naming `source`, for anything else."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} is damaged or holds more than data, of which nothing was run ({reason})") from error


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Raise what failed inside torch's checkpoint code as an ordinary exception: its own is no `Exception`.

    Raises DiskError where the disk refused on any rank.
    """
    try:
        yield
    except CheckpointException as error:
        rank, cause = _first_cause(error)
        if isinstance(cause, OSError) and (line := refusal(cause, folder)) is not None:
            raise DiskError(line) from error
        if _says_unwritten(cause):
            raise _unnamed_refusal(folder) from error
        raise RuntimeError(f"{folder}: rank {rank}: {type(cause).__name__}: {cause}") from error
    except RuntimeError as error:
        if not _says_unwritten(error):
            raise
        raise _unnamed_refusal(folder) from error


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Raise ValueError in one line for what damaged or crafted files make torch, Megatron or a reader of theirs raise.

    A checkpoint of another architecture stays Megatron's CheckpointingException.
    """
    try:
        yield
    except _OF_MACHINE:
        raise
    except _OF_CONTENT as error:
        raise ValueError(
            f"{folder} is damaged or not of this program, and nothing in it was run ({type(error).__name__}:"
            f" {_short(error)})"
        ) from error
    except CheckpointException as error:
        rank, cause = _first_cause(error)
        of_disk = (
            isinstance(cause, OSError) and cause.errno != errno.EINVAL
        )  # that of a place before a file's beginning
        if of_disk or isinstance(cause, _OF_MACHINE):
            raise cause from error
        raise ValueError(
            f"{folder} is damaged or holds more than data, of which nothing was run (rank {rank}:"
            f" {type(cause).__name__}: {_short(cause)})"
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[-200:]


def _first_cause(error: CheckpointException) -> tuple[int, BaseException]:
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    return rank, cause


def _says_unwritten(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _WRITE_FAILURES)


def _unnamed_refusal(folder: Path) -> DiskError:
    return DiskError(
        f"{folder} cannot be written: torch gives no reason ({free_bytes(folder):,} bytes are free there); make space"
        " or choose another folder"
    )
