"""Saves and loads models and their distributed optimizer by Megatron's dist_checkpointing.

The `torch_dist` folders can be read in any layout and by other tools. `training_state` adds names, manifest, atomicity.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
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
from megatron_rlt.checkpoint.torch_format import DataOnlyCommonStrategy, DataOnlyLoadStrategy, loading, saving
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.whole_files import write_bytes, write_text

# Optimizer state as full tensors in the weights' shapes, so that tp, pp and dp may all change on resume.
_CONTENT_METADATA = "content_metadata"  # Megatron's own name of it among the common state
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class TorchSaveStrategy(SaveShardedStrategy):  # type: ignore[misc]
    """Megatron's `torch_dist` format, written by torch's own synchronous writer.

    Megatron's default writer forks worker processes that import the main module again and call CUDA; this one does not,
    and was faster on CPU. It uses private helpers of megatron-core 0.16.1, which is pinned.
    """

    can_handle_sharded_objects = True

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save_distributed(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_model(model: LanguageModel, folder: Path) -> None:
    """Write a model's weights to an empty folder on a shared file system. Collective on the whole job."""
    with model.layout:
        _save(_tensors(model.sharded_state_dict(metadata=dict(_METADATA))), folder, model.layout)


def load_model(model: LanguageModel, folder: Path) -> None:
    """Overwrite a model's weights with those of a folder written in any layout. Collective on the whole job.

    Raises ValueError and Megatron's CheckpointingException as `loading` does.
    """
    with model.layout, loading(folder):
        state = model.sharded_state_dict(metadata=dict(_METADATA))
        objects = [key for key, value in state.items() if isinstance(value, ShardedObject)]
        # Modules that could have an object state ask for it: None is what they have without delayed scaling in FP8.
        model.load_state_dict(_load(_tensors(state), folder) | dict.fromkeys(objects))


def save_optimizer(optimizer: MegatronOptimizer, model: LanguageModel, folder: Path) -> None:
    """Write main weights, moments and parameter groups to an empty folder. Collective on the whole job.

    Gathers the tensors over data-parallel ranks in host memory: 12 bytes per weight of this rank's shard.
    """
    _allocate_moments(optimizer)
    with model.layout:
        weights = model.sharded_state_dict(metadata=dict(_METADATA))
        _save(optimizer.sharded_state_dict(weights, metadata=dict(_METADATA)), folder, model.layout)


def load_optimizer(optimizer: MegatronOptimizer, model: LanguageModel, folder: Path) -> None:
    """Overwrite the optimizer's state with that of a folder written in any layout. Collective on the whole job.

    Raises ValueError and Megatron's CheckpointingException as `loading` does.
    """
    _allocate_moments(optimizer)
    with model.layout, loading(folder):
        weights = model.sharded_state_dict(metadata=dict(_METADATA))
        state = _load(optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(_METADATA)), folder)
        parts = _parts(optimizer)
        for index, part in enumerate(parts):
            _restore(part, state if len(parts) == 1 else state[index])


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A model's state without objects, such as Transformer Engine's `_extra_state`: an object is a pickle."""
    return {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}


def _save(state: dict[str, Any], folder: Path, layout: Layout) -> None:
    strategy: SaveShardedStrategy = TorchSaveStrategy()
    if layout.dp_cp > 1:  # replicas write different tensors instead of waiting for the first one
        strategy = FullyParallelSaveStrategyWrapper(strategy, layout.dp_cp_group)
    with _without_deprecations():
        tensors, common = save_preprocess(state | {_CONTENT_METADATA: dict(_METADATA)}, True)
        # As `dist_checkpointing.save`, but a disk that refuses the first rank's own files must not leave the others in
        # a collective.
        with all_or_none(f"writing {folder}"):
            if dist.get_rank() == 0:
                content = io.BytesIO()
                torch.save(common, content)
                write_bytes(folder / COMMON_STATE_FNAME, content.getvalue())
        with saving(folder):
            strategy.save(tensors, folder)
        with all_or_none(f"writing {folder}"):
            if dist.get_rank() == 0:
                kind = CheckpointingConfig(strategy.backend, strategy.version)
                write_text(folder / CONFIG_FNAME, json.dumps(asdict(kind)))


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
    expected = asdict(CheckpointingConfig(TorchSaveStrategy().backend, TorchSaveStrategy().version))
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


def _restore(part: Any, state: dict[str, Any]) -> None:  # noqa: ANN401 - Megatron's optimizers are untyped
    """Load one optimizer in two steps, around two bugs of megatron-core 0.16.1 with torch's Adam.

    Its loader of moments expects a tensor `step`, which is a number of the parameter group; and it gives all weights
    the same `step` tensor, which torch would then advance once per weight at each update.
    """
    moments = state.pop("param_state")
    part.load_state_dict(state)
    inner = part.optimizer
    steps = {weight: inner.state[weight].pop("step") for weight in _weights(part) if "step" in inner.state[weight]}
    part.load_parameter_state_from_fully_reshardable(moments)
    for weight, step in steps.items():
        inner.state[weight]["step"] = step.clone()


def _weights(part: Any) -> Iterator[torch.Tensor]:  # noqa: ANN401 - Megatron's optimizers are untyped
    for group in part.optimizer.param_groups:
        yield from group["params"]
