"""Saves and restores everything a run needs to continue bit for bit: one folder a checkpoint, complete or absent.

In: models, optimizer, schedule, random-number states, the data position and counters. Out: `step-000007/` with one
Megatron distributed checkpoint per model and one for the optimizer, a file per rank, a shared part and a manifest.
Weights, moments and the shared part can be read in any layout; random-number states only in the one they came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule

from megatron_rlt.checkpoint.folders import (
    CheckpointInfo,
    all_or_none,
    keep_newest,
    list_checkpoints,
    step_folder,
    sweep_leftovers,
    temporary_folder,
)
from megatron_rlt.checkpoint.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    SavedLayout,
    hash_files,
    list_files,
    sync_folder,
    write_synced,
)
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.sharded import load_model, load_optimizer, save_model, save_optimizer
from megatron_rlt.parallel.layout import Layout

POLICY = "policy"
"""Name of the model that the optimizer trains."""


_SAMPLED_AHEAD = "sampled_ahead.bin"


_PACKAGES = ("megatron-rlt", "megatron-core", "torch")


@dataclass(frozen=True)
class SharedState:
    """What is the same on every rank and has no tensors."""

    data_position: bytes  # whatever the data loader needs to continue at the next row
    counters: Mapping[str, Any]  # JSON values, by name
    sampled_ahead: bytes = b""  # completions of the next step, where they exist already


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint held besides tensors."""

    step: int
    num_updates: int
    shared: SharedState
    rank_state: RankState | None  # None when the layout has changed: its random numbers belong to other shards


def save_training_state(
    folder: Path,
    step: int,
    *,
    models: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    rank_state: RankState,
    shared_state: SharedState,
    num_updates: int,
    layout: Layout,
    keep_last: int,
) -> CheckpointInfo:
    """Write `folder/step-<step>` and remove older checkpoints. Collective on the whole job.

    Args:
        folder: of all checkpoints of the run, on a file system that every rank sees.
        models: this rank's shards, not wrapped in DistributedDataParallel, all in `layout`; the optimizer's is POLICY.
        shared_state: the same on every rank; rank 0's is written.
        num_updates: optimizer updates so far that had a non-zero gradient and learning rate.
        keep_last: checkpoints kept, the new one included.

    Raises:
        ValueError: a checkpoint of this step exists.
        RuntimeError: a rank could not write; or updates were made but the same bits would be saved again.
    """
    is_first = dist.get_rank() == 0
    temporary, final = temporary_folder(folder, step), step_folder(folder, step)
    with all_or_none(f"preparing {temporary}"):
        if is_first:
            _make_folders(folder, step, models)
    for name, model in models.items():
        save_model(model, temporary / "models" / name, layout)
    save_optimizer(optimizer, models[POLICY], temporary / "optimizer", layout)
    with all_or_none(f"writing {temporary}"):
        write_synced(temporary / "ranks" / _rank_file(), rank_state.to_bytes())
        if is_first:
            _write_shared(temporary, shared_state, scheduler)
    manifest = _manifest(temporary, step, num_updates, models, layout)
    with all_or_none(f"completing {final}"):
        if is_first:
            _refuse_stale_bits(folder, manifest)
            manifest.write(temporary)
            sync_folder(temporary)
            temporary.rename(final)
            keep_newest(folder, keep_last)
    return CheckpointInfo(final, manifest)


def load_training_state(
    info: CheckpointInfo,
    *,
    models: Mapping[str, MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    layout: Layout,
) -> LoadedState:
    """Overwrite models, optimizer and schedule with a checkpoint that `find_resumable` gave. Collective.

    Random numbers are not touched: call `rank_state.restore_rng()` once everything else is built.

    Raises:
        ValueError: the checkpoint lacks one of the models.
    """
    path, manifest = info.path, info.manifest
    if missing := sorted(set(models) - set(manifest.models)):
        raise ValueError(
            f"a run resumes with the models it was saved with; {path} holds {list(manifest.models)} but not {missing}: "
            "resume with the configuration of the saved run"
        )
    for name, model in models.items():
        load_model(model, path / "models" / name, layout)
    load_optimizer(optimizer, models[POLICY], path / "optimizer", layout)
    shared = json.loads((path / "shared.json").read_text(encoding="utf-8"))
    scheduler.num_steps = 0  # Megatron's load adds the saved count to the present one
    scheduler.load_state_dict(shared["scheduler"])
    same_layout = manifest.layout == SavedLayout(layout.tp, layout.pp, layout.dp, layout.sp, layout.cp)
    return LoadedState(
        step=manifest.step,
        num_updates=manifest.num_updates,
        shared=SharedState(
            (path / "data_position.bin").read_bytes(),
            shared["counters"],
            (path / _SAMPLED_AHEAD).read_bytes() if (path / _SAMPLED_AHEAD).exists() else b"",
        ),
        rank_state=RankState.from_bytes((path / "ranks" / _rank_file()).read_bytes()) if same_layout else None,
    )


def _rank_file() -> str:
    return f"rank-{dist.get_rank():05d}.pt"


def _make_folders(folder: Path, step: int, models: Mapping[str, MegatronModule]) -> None:
    final, temporary = step_folder(folder, step), temporary_folder(folder, step)
    if final.exists():
        raise ValueError(f"a step is saved once; {final} exists: remove it to save the step again")
    folder.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(folder)
    for name in (*(f"models/{name}" for name in models), "optimizer", "ranks"):
        (temporary / name).mkdir(parents=True)


def _write_shared(temporary: Path, shared: SharedState, scheduler: OptimizerParamScheduler) -> None:
    content = {"counters": dict(shared.counters), "scheduler": scheduler.state_dict()}
    write_synced(temporary / "shared.json", json.dumps(content, indent=2).encode())
    write_synced(temporary / "data_position.bin", shared.data_position)
    if shared.sampled_ahead:
        write_synced(temporary / _SAMPLED_AHEAD, shared.sampled_ahead)


def _manifest(
    temporary: Path, step: int, num_updates: int, models: Mapping[str, MegatronModule], layout: Layout
) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=step,
        num_updates=num_updates,
        layout=SavedLayout(layout.tp, layout.pp, layout.dp, layout.sp, layout.cp),
        models=tuple(sorted(models)),
        float32_weights=all(weight.dtype == torch.float32 for weight in models[POLICY].parameters()),
        versions={package: version(package) for package in _PACKAGES},
        files=_hash_together(temporary),
    )


def _hash_together(temporary: Path) -> dict[str, FileRecord]:
    """Hash every file written so far, each rank a share: reading back also shows that the files are there."""
    box = [list_files(temporary)]
    dist.broadcast_object_list(box, src=0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine: dict[str, FileRecord] = {}
    with all_or_none(f"reading back {temporary}"):
        mine = hash_files(temporary, box[0][rank::world_size])
    shares: list[dict[str, FileRecord]] = [{}] * world_size
    dist.all_gather_object(shares, mine)
    return {name: record for share in shares for name, record in sorted(share.items())}


def _refuse_stale_bits(folder: Path, new: Manifest) -> None:
    """Stop when training moved but the saved tensors did not (seen elsewhere: NeMo-RL issue 3312).

    In bfloat16 a small update may round to nothing, so there the optimizer's fp32 weights must stand still as well.
    """
    earlier = list_checkpoints(folder)
    if not earlier:
        return
    try:
        old = Manifest.read(earlier[-1])
    except ValueError:  # a damaged predecessor is reported on resume; it must not keep the new state from being saved
        return
    same_weights = old.tensors_sha256(f"models/{POLICY}") == new.tensors_sha256(f"models/{POLICY}")
    same_optimizer = old.tensors_sha256("optimizer") == new.tensors_sha256("optimizer")
    if new.num_updates > old.num_updates and same_weights and (new.float32_weights or same_optimizer):
        raise RuntimeError(
            f"saved weights must change with training; step {new.step} would save the bits of step {old.step} again "
            f"although {new.num_updates - old.num_updates} updates were made in between: the checkpoint was not written"
        )
