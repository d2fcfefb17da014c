"""Finds the optimizer state beside weights: in a checkpoint of ours, Megatron-LM or Megatron-Bridge. No torch.

Only Megatron's fully reshardable form is read: whole tensors in the weights' shapes, whatever the layout of
the save.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.config.folders.description import ModelDescription
from megatron_rlt.config.folders.kind import CHECKPOINT_MANIFEST, COMMON_FILE, POLICY_MODEL, Kind
from megatron_rlt.config.folders.pickles import read_torch_file
from megatron_rlt.config.folders.tensors import TensorFolder, read_tensor_folder

HOLDERS = (Kind.MEGATRON, Kind.BRIDGE)
STATE_PREFIX = "optimizer.state."  # then `exp_avg.`, then the weight's name
FULLY_RESHARDABLE = "fully_reshardable"
_RESHARDABLE = "full"  # as checkpoint.reshardable says it
_STATES = ("param", "exp_avg", "exp_avg_sq")  # main weights, first and second moments
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state of a model."""

    tensors: TensorFolder
    states: tuple[str, ...]
    common: Mapping[str, Any]  # parameter groups with their step, as Megatron's optimizer wants them
    scheduler: Mapping[str, Any] | None
    iteration: int


def find_optimizer_state(described: ModelDescription) -> OptimizerState:
    """The optimizer state of a described folder.

    Raises:
        ValueError: there is none, or not in the form that can be read.
    """
    found = described.found
    if found.kind not in HOLDERS or described.tensors is None:
        raise ValueError(f"{found.folder}: optimizer state of a {found.what} is not read; leave --optimizer out")
    checkpoint = found.weights.parents[1]
    if (checkpoint / CHECKPOINT_MANIFEST).is_file() and found.weights == checkpoint / POLICY_MODEL:
        return _of_own_checkpoint(checkpoint)
    common = _common(found.weights)
    tensors = described.tensors
    return _checked(found.weights, tensors, common.get("optimizer"), common.get("opt_param_scheduler"), common)


def _of_own_checkpoint(checkpoint: Path) -> OptimizerState:
    folder = checkpoint / "optimizer"
    manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("reshardable", _RESHARDABLE) != _RESHARDABLE:
        raise ValueError(
            f"{checkpoint}: was saved with checkpoint.reshardable={manifest['reshardable']}, so its optimizer state"
            f" belongs to the layout of the save; save one with checkpoint.reshardable={_RESHARDABLE}, or leave"
            " --optimizer out"
        )
    common = _common(folder)
    shared = json.loads((checkpoint / "shared.json").read_text(encoding="utf-8"))
    optimizer = {name: value for name, value in common.items() if name != "content_metadata"}
    return _checked(
        folder, read_tensor_folder(folder), optimizer, shared.get("scheduler"), {"iteration": manifest["step"]}
    )


def _common(folder: Path) -> Mapping[str, Any]:
    file = folder / COMMON_FILE
    common = read_torch_file(file) if file.is_file() else None
    if not isinstance(common, dict):
        raise ValueError(f"{file}: missing or no dictionary; copy the checkpoint again, or leave --optimizer out")
    return common


def _checked(
    folder: Path, tensors: TensorFolder, optimizer: object, scheduler: object, common: Mapping[str, Any]
) -> OptimizerState:
    if not isinstance(optimizer, dict):
        raise ValueError(f"{folder}: holds no optimizer state (it was saved without); leave --optimizer out")
    form = optimizer.get("param_state_sharding_type")
    if form != FULLY_RESHARDABLE:
        raise ValueError(
            f"{folder}: optimizer state in the form {form or 'of an ordinary or several chained optimizers'!r}, which"
            " depends on the save's layout; save it with Megatron's --dist-ckpt-optim-fully-reshardable"
        )
    if not _is_plain(optimizer) or not _is_plain(scheduler):
        raise ValueError(f"{folder / COMMON_FILE}: optimizer or schedule hold more than numbers and names")
    names = {name.removeprefix(STATE_PREFIX).partition(".")[0] for name in tensors.tensors if _is_state(name)}
    if names != {*_STATES}:
        raise ValueError(
            f"{folder}: optimizer state {', '.join(sorted(names)) or 'without tensors'} is not Adam's"
            f" ({', '.join(_STATES)}); leave --optimizer out"
        )
    iteration = common.get("iteration")
    number = iteration if isinstance(iteration, int) else 0
    return OptimizerState(tensors, _STATES, optimizer, scheduler if isinstance(scheduler, dict) else None, number)


def _is_state(name: str) -> bool:
    return name.startswith(STATE_PREFIX)


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)
