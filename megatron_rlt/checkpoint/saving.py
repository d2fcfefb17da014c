"""Saves all that a run needs to continue bit for bit: first captured, then written as a whole folder or not at all.

Capturing belongs to a step boundary and uses the models' own groups. Writing uses only the group that it is given, so a
thread may do it with a group of its own while training goes on; then what was captured must be copies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rlt.checkpoint.folders import (
    CheckpointInfo,
    all_or_none,
    keep_newest,
    list_checkpoints,
    step_folder,
    sweep_leftovers,
)
from megatron_rlt.checkpoint.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    SavedLayout,
    hash_files,
    list_files,
    rank_file,
)
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.sharded import ShardedState, model_state, optimizer_state, write_sharded
from megatron_rlt.checkpoint.training_state import (
    DATA_POSITION,
    POLICY,
    SAMPLED_AHEAD,
    SHARED,
    SharedState,
    saved_layout,
)
from megatron_rlt.config.training import Reshardable
from megatron_rlt.disk_faults import writing
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.whole_files import flush_to_disk, make_folder, temporary_beside, write_bytes

_PACKAGES = ("megatron-rlt", "megatron-core", "torch")


@dataclass(frozen=True)
class CapturedState:
    """What this rank writes of one checkpoint."""

    step: int
    num_updates: int
    models: Mapping[str, ShardedState]
    optimizer: ShardedState
    rank_state: bytes
    shared_files: Mapping[str, bytes]  # by name; the first rank writes them
    layout: SavedLayout
    float32_weights: bool
    reshardable: Reshardable


def capture_training_state(
    step: int,
    *,
    models: Mapping[str, LanguageModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    rank_state: RankState,
    shared_state: SharedState,
    num_updates: int,
    reshardable: Reshardable,
    copy: bool,
) -> CapturedState:
    """Find what each rank writes. Collective on the whole job.

    Args:
        models: this rank's shards, not wrapped in DistributedDataParallel, in one layout; the optimizer trains POLICY.
        num_updates: optimizer updates so far with a non-zero gradient and learning rate.
        copy: tensors into host memory of their own, so that training may go on before they are written.
    """
    return CapturedState(
        step=step,
        num_updates=num_updates,
        models={name: model_state(model, copy=copy) for name, model in models.items()},
        optimizer=optimizer_state(optimizer, models[POLICY], reshardable, copy=copy),
        rank_state=rank_state.to_bytes(),
        shared_files=_shared_files(shared_state, scheduler),
        layout=saved_layout(models[POLICY]),
        float32_weights=all(weight.dtype == torch.float32 for weight in models[POLICY].parameters()),
        reshardable=reshardable,
    )


def write_training_state(
    captured: CapturedState, folder: Path, *, keep_last: int, group: dist.ProcessGroup
) -> CheckpointInfo:
    """Write `folder/step-<step>` and remove older checkpoints. Collective on the group, which has all ranks.

    Args:
        folder: holds all checkpoints of the run, on a shared file system.
        keep_last: number of checkpoints to keep, the new one included.

    Raises:
        ValueError: a checkpoint of this step exists.
        RuntimeError: a rank could not write; or the weights are those of the last checkpoint in spite of updates.
    """
    is_first, final = group.rank() == 0, step_folder(folder, captured.step)
    temporary = broadcast_record(temporary_beside(final), source_rank=0, group=group)
    with all_or_none(f"preparing {final}", group):
        if is_first:
            _make_folders(final, temporary, captured)
    try:
        for name, state in captured.models.items():
            write_sharded(state, temporary / "models" / name, group)
        write_sharded(captured.optimizer, temporary / "optimizer", group)
        with all_or_none(f"writing {final}", group):
            write_bytes(temporary / rank_file(group.rank()), captured.rank_state)
            if is_first:
                for name, content in captured.shared_files.items():
                    write_bytes(temporary / name, content)
        manifest = _manifest(captured, _hash_together(temporary, group))
        with all_or_none(f"completing {final}", group), writing(final):
            if is_first:
                _refuse_stale_bits(folder, manifest)
                manifest.write(temporary)
                flush_to_disk(temporary)
                temporary.rename(final)
    except BaseException:
        if is_first:  # a full disk must not stay full of what was not saved
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with all_or_none(f"removing checkpoints before {final}", group):
        if is_first:
            keep_newest(folder, keep_last)
    return CheckpointInfo(final, manifest)


def _make_folders(final: Path, temporary: Path, captured: CapturedState) -> None:
    if final.exists():
        raise ValueError(f"a step is saved once; {final} exists: remove it to save the step again")
    make_folder(final.parent)
    sweep_leftovers(final.parent)
    for name in (*(f"models/{name}" for name in captured.models), "optimizer", "ranks"):
        make_folder(temporary / name)


def _shared_files(shared: SharedState, scheduler: OptimizerParamScheduler) -> dict[str, bytes]:
    content = {"counters": dict(shared.counters), "scheduler": scheduler.state_dict()}
    files = {SHARED: json.dumps(content, indent=2).encode(), DATA_POSITION: shared.data_position}
    return files | ({SAMPLED_AHEAD: shared.sampled_ahead} if shared.sampled_ahead else {})


def _manifest(captured: CapturedState, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=captured.step,
        num_updates=captured.num_updates,
        layout=captured.layout,
        models=tuple(sorted(captured.models)),
        float32_weights=captured.float32_weights,
        reshardable=captured.reshardable,
        versions={package: version(package) for package in _PACKAGES},
        files=files,
    )


def _hash_together(temporary: Path, group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Hash every file written so far, split over the ranks; reading back also shows that the files exist."""
    names = broadcast_record(list_files(temporary), source_rank=0, group=group)
    rank, size = group.rank(), group.size()
    mine: dict[str, FileRecord] = {}
    with all_or_none(f"reading back {temporary}", group), writing(temporary):
        mine = hash_files(temporary, names[rank::size])
    shares: list[dict[str, FileRecord]] = [{}] * size
    dist.all_gather_object(shares, mine, group=group)
    return {name: record for share in shares for name, record in sorted(share.items())}


def _refuse_stale_bits(folder: Path, new: Manifest) -> None:
    """Raise if updates were made but the saved tensors did not change (as in NeMo-RL issue 3312).

    A small update may round to zero in bfloat16; then only equal fp32 weights of the optimizer are an error.
    """
    earlier = list_checkpoints(folder)
    if not earlier:
        return
    try:
        old = Manifest.read(earlier[-1])
    except ValueError:  # a damaged predecessor is reported on resume; it must not block this save
        return
    same_weights = old.tensors_sha256(f"models/{POLICY}") == new.tensors_sha256(f"models/{POLICY}")
    same_optimizer = old.tensors_sha256("optimizer") == new.tensors_sha256("optimizer")
    if new.num_updates > old.num_updates and same_weights and (new.float32_weights or same_optimizer):
        raise RuntimeError(
            f"saved weights must change with training; step {new.step} would save the bits of step {old.step} again "
            f"although {new.num_updates - old.num_updates} updates were made in between: the checkpoint was not written"
        )
