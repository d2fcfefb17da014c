"""Saves and loads models and their distributed optimizer by Megatron's dist_checkpointing.

Saving has two parts: what a rank writes, found together with the other ranks, and the writing. The `torch_dist` folders
can be read in any layout and by other tools, but for optimizers of kind `tp_pp`. `saving` adds names, manifest,
atomicity.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from megatron_rlt.checkpoint.folders import all_or_none
from megatron_rlt.checkpoint.own_parts import own_parts, restore_own_parts
from megatron_rlt.checkpoint.torch_format import DataOnlyCommonStrategy, DataOnlyLoadStrategy, loading, saving
from megatron_rlt.config.training import Reshardable
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import world
from megatron_rlt.whole_files import write_bytes, write_text

# Optimizer state as full tensors in the weights' shapes, so that tp, pp and dp may all change on resume.
_CONTENT_METADATA = "content_metadata"  # Megatron's own name of it among the common state
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_OWN_PARTS = {"distrib_optim_sharding_type": "own_parts_by_tp_pp"}  # this program's own
_BACKEND, _BACKEND_VERSION = "torch_dist", 1
_COPY_AHEAD_BYTES = 10_000_000  # from the GPU while the tensor before is written; torch's default. 0: no CUDA stream


@dataclass(frozen=True)
class ShardedState:
    """What this rank writes of one folder: its tensors, and what all ranks have in common."""

    tensors: dict[str, Any]  # in the form of torch's distributed checkpoints
    common: bytes
    on_host: bool  # the tensors are copies in host memory, which training does not change


def model_state(model: LanguageModel, *, copy: bool) -> ShardedState:
    """A model's weights. Collective on the whole job. `copy`: into host memory, so that training may go on."""
    with model.layout:
        return _state(_tensors(model.sharded_state_dict(metadata=dict(_METADATA))), _METADATA, model.layout, copy=copy)


def optimizer_state(
    optimizer: MegatronOptimizer, model: LanguageModel, reshardable: Reshardable, *, copy: bool
) -> ShardedState:
    """Main weights, moments and parameter groups; `copy` as for `model_state`. Collective on the whole job.

    `full` gathers the tensors over data-parallel ranks in host memory: 12 bytes per weight of this rank's shard, until
    the state is written or this rank's share of it is copied.
    """
    _allocate_moments(optimizer)
    with model.layout:
        if reshardable == "tp_pp":
            return _state(_with_own_parts(optimizer, model), _OWN_PARTS, model.layout, copy=copy)
        weights = model.sharded_state_dict(metadata=dict(_METADATA))
        state = optimizer.sharded_state_dict(weights, metadata=dict(_METADATA))
        return _state(state, _METADATA, model.layout, copy=copy)


def write_sharded(state: ShardedState, folder: Path, group: dist.ProcessGroup) -> None:
    """Write to an empty folder on a shared file system. Collective on the group, which has all ranks."""
    is_first = group.rank() == 0
    # As `dist_checkpointing.save`, but a disk that refuses the first rank's own files must not leave the others in
    # a collective.
    with all_or_none(f"writing {folder}", group):
        if is_first:
            write_bytes(folder / COMMON_STATE_FNAME, state.common)
    with saving(folder):
        save_distributed(
            state.tensors,
            storage_writer=FileSystemWriter(folder, per_thread_copy_ahead=0 if state.on_host else _COPY_AHEAD_BYTES),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )
    with all_or_none(f"writing {folder}", group):
        if is_first:
            write_text(folder / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig(_BACKEND, _BACKEND_VERSION))))


def save_model(model: LanguageModel, folder: Path) -> None:
    """Write a model's weights to an empty folder on a shared file system. Collective on the whole job."""
    write_sharded(model_state(model, copy=False), folder, world())


def load_model(model: LanguageModel, folder: Path) -> None:
    """Overwrite a model's weights with those of a folder written in any layout. Collective on the whole job.

    Raises ValueError and Megatron's CheckpointingException as `loading` does.
    """
    with model.layout, loading(folder):
        state = model.sharded_state_dict(metadata=dict(_METADATA))
        objects = [key for key, value in state.items() if isinstance(value, ShardedObject)]
        # Modules that could have an object state ask for it: None is what they have without delayed scaling in FP8.
        model.load_state_dict(_load(_tensors(state), folder) | dict.fromkeys(objects))


def load_optimizer(optimizer: MegatronOptimizer, model: LanguageModel, folder: Path, reshardable: Reshardable) -> None:
    """Overwrite the optimizer's state with that of a folder. Collective on the whole job.

    `reshardable`: of the save. `full` was written in any layout, `tp_pp` in one with this tp and pp.
    Raises ValueError and Megatron's CheckpointingException as `loading` does.
    """
    _allocate_moments(optimizer)
    with model.layout, loading(folder):
        if reshardable == "tp_pp":
            state = _load(_with_own_parts(optimizer, model), folder)
        else:
            weights = model.sharded_state_dict(metadata=dict(_METADATA))
            state = _load(optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(_METADATA)), folder)
        parts = _parts(optimizer)
        for index, part in enumerate(parts):
            _restore(part, state if len(parts) == 1 else state[index], reshardable)


def _with_own_parts(optimizer: MegatronOptimizer, model: LanguageModel) -> dict[str, Any]:
    """As Megatron's `sharded_state_dict` of an optimizer, without gathered tensors."""
    (part,) = _parts(optimizer)  # a dense model has one
    common: dict[str, Any] = part.state_dict()
    return common | {"param_state": own_parts(part, model)}


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without objects, such as Transformer Engine's `_extra_state`: an object is a pickle."""
    return {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}


def _state(state: dict[str, Any], metadata: dict[str, Any], layout: Layout, *, copy: bool) -> ShardedState:
    """What this rank writes of a state. Replicas write different tensors instead of waiting for the first one.

    Torch's own writer writes it: Megatron's forks processes, which import the main module again and call CUDA, and was
    slower on CPU. This uses private helpers of megatron-core 0.16.1, which is pinned.
    """
    with _without_deprecations():
        tensors, common = save_preprocess(state | {_CONTENT_METADATA: dict(metadata)}, True)
        if layout.dp_cp > 1:
            writers = determine_main_replica_uniform_distribution(tensors, layout.dp_cp_group)
            distribute_main_replicas_with_precomputed_distribution(tensors, layout.dp_cp_group, writers)
        mine, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        if copy:
            mine = {key: [_copied(shard) for shard in shards] for key, shards in mine.items()}
        content = io.BytesIO()
        torch.save(common, content)
        return ShardedState(mcore_to_pyt_state_dict(mine), content.getvalue(), on_host=copy)


def _copied(shard: ShardedTensor) -> ShardedTensor:
    return replace(shard, data=shard.data.detach().to("cpu", copy=True))


def _load(state: dict[str, Any], folder: Path) -> dict[Any, Any]:
    _require_own_format(folder)
    with _without_deprecations():
        loaded: dict[Any, Any] = dist_checkpointing.load(
            state, str(folder), DataOnlyLoadStrategy(), DataOnlyCommonStrategy(), strict=StrictHandling.RAISE_ALL
        )
    loaded.pop(_CONTENT_METADATA)
    return loaded


def _require_own_format(folder: Path) -> None:
    """Megatron looks the format up in this file, and does not check what it finds."""
    file = folder / CONFIG_FNAME
    expected = asdict(CheckpointingConfig(_BACKEND, _BACKEND_VERSION))
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if found != expected:
        raise ValueError(f"{file} does not say that this is a checkpoint of this program ({json.dumps(expected)})")


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Megatron-core 0.16.1 calls functions that torch 2.13 deprecates; a user cannot act on these warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer that never stepped the zero state of its first step; Megatron asserts that it exists."""
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.Adam):
            part.init_state_fn(part.optimizer, part.config)
            continue
        for weight in _weights(part):
            if not part.optimizer.state[weight]:
                zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[weight] = {"step": torch.tensor(0.0), **zeros}


def _restore(part: Any, state: dict[str, Any], reshardable: Reshardable) -> None:  # noqa: ANN401 - untyped
    """Load one optimizer in two steps, around two bugs of megatron-core 0.16.1 with torch's Adam.

    Its loader of moments expects a tensor `step`, which is a number of the parameter group; and it gives all weights
    the same `step` tensor, which torch would then advance once per weight at each update.
    """
    moments = state.pop("param_state")
    part.load_state_dict(state)
    inner = part.optimizer
    steps = {weight: inner.state[weight].pop("step") for weight in _weights(part) if "step" in inner.state[weight]}
    if reshardable == "tp_pp":
        restore_own_parts(part, moments)
    else:
        part.load_parameter_state_from_fully_reshardable(moments)
    for weight, step in steps.items():
        inner.state[weight]["step"] = step.clone()


def _weights(part: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401 - Megatron's optimizers are untyped
    for group in part.optimizer.param_groups:
        yield from group["params"]
