"""Saves and restores all state that a run needs to continue bit for bit, in one folder per checkpoint.

`step-000007/` has one Megatron distributed checkpoint per model and one for the optimizer, one file per rank, shared
files and a manifest. All can be read in any layout except random-number states, which need the layout of the save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

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
from megatron_rlt.checkpoint.sharded import load_model, load_optimizer, save_model, save_optimizer
from megatron_rlt.checkpoint.torch_format import loading
from megatron_rlt.disk_faults import writing
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.whole_files import flush_to_disk, make_folder, temporary_beside, write_bytes, write_text

POLICY = "policy"  # name of the model that the optimizer trains
_SHARED, _DATA_POSITION, _SAMPLED_AHEAD = "shared.json", "data_position.json", "sampled_ahead.bin"
_PACKAGES = ("megatron-rlt", "megatron-core", "torch")


@dataclass(frozen=True)
class SharedState:
    """State without tensors that is the same on every rank."""

    data_position: bytes  # the data loader's state as JSON, to continue at the next row
    counters: Mapping[str, Any]  # JSON values by name
    sampled_ahead: bytes = b""  # completions of the next step, if they were sampled already

    def counter(self, name: str) -> int:
        """A whole number by name. Raises ValueError where it is none."""
        value = self.counters.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"{_SHARED} of the checkpoint says {repr(value)[:50]} for {name}, a number from 0: take an intact one"
            )
        return value


@dataclass(frozen=True)
class LoadedState:
    """A checkpoint's content besides tensors."""

    step: int
    num_updates: int
    shared: SharedState
    rank_state: RankState | None  # None if the layout has changed: random numbers belong to its shards


def save_training_state(
    folder: Path,
    step: int,
    *,
    models: Mapping[str, LanguageModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    rank_state: RankState,
    shared_state: SharedState,
    num_updates: int,
    keep_last: int,
) -> CheckpointInfo:
    """Write `folder/step-<step>` and remove older checkpoints. Collective on the whole job.

    Args:
        folder: holds all checkpoints of the run, on a shared file system.
        models: this rank's shards, not wrapped in DistributedDataParallel, in one layout; the optimizer trains POLICY.
        num_updates: optimizer updates so far with a non-zero gradient and learning rate.
        keep_last: number of checkpoints to keep, the new one included.

    Raises:
        ValueError: a checkpoint of this step exists.
        RuntimeError: a rank could not write; or the weights are those of the last checkpoint in spite of updates.
    """
    is_first, final = dist.get_rank() == 0, step_folder(folder, step)
    temporary = broadcast_record(temporary_beside(final), source_rank=0, group=world())
    with all_or_none(f"preparing {final}"):
        if is_first:
            _make_folders(final, temporary, models)
    try:
        for name, model in models.items():
            save_model(model, temporary / "models" / name)
        save_optimizer(optimizer, models[POLICY], temporary / "optimizer")
        with all_or_none(f"writing {final}"):
            write_bytes(temporary / rank_file(dist.get_rank()), rank_state.to_bytes())
            if is_first:
                _write_shared(temporary, shared_state, scheduler)
        manifest = _manifest(temporary, step, num_updates, models)
        with all_or_none(f"completing {final}"), writing(final):
            if is_first:
                _refuse_stale_bits(folder, manifest)
                manifest.write(temporary)
                flush_to_disk(temporary)
                temporary.rename(final)
    except BaseException:
        if is_first:  # a full disk must not stay full of what was not saved
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with all_or_none(f"removing checkpoints before {final}"):
        if is_first:
            keep_newest(folder, keep_last)
    return CheckpointInfo(final, manifest)


def load_training_state(
    info: CheckpointInfo,
    *,
    models: Mapping[str, LanguageModel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> LoadedState:
    """Overwrite models, optimizer and schedule with a checkpoint from `find_resumable`. Collective.

    Random-number states stay: call `rank_state.restore_rng()` once everything else is built.

    Raises:
        ValueError: the checkpoint lacks one of the models, or is not of these models, or was not written by this
            program.
    """
    path, manifest = info.path, info.manifest
    if missing := sorted(set(models) - set(manifest.models)):
        raise ValueError(
            f"a run resumes with the models it was saved with; {path} holds {list(manifest.models)} but not {missing}: "
            "resume with the configuration of the saved run"
        )
    try:
        for name, model in models.items():
            load_model(model, path / "models" / name)
        load_optimizer(optimizer, models[POLICY], path / "optimizer")
    except CheckpointingException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds the state of other models than this run's: {reason}") from error
    shared = _read_shared(path / _SHARED)
    scheduler.num_steps = 0  # Megatron's load adds the saved count to the present one
    with loading(path / _SHARED):
        scheduler.load_state_dict(dict(shared.scheduler))
    sampled_ahead = (path / _SAMPLED_AHEAD).read_bytes() if _SAMPLED_AHEAD in manifest.files else b""
    same_layout = manifest.layout == _saved_layout(models)
    return LoadedState(
        step=manifest.step,
        num_updates=manifest.num_updates,
        shared=SharedState((path / _DATA_POSITION).read_bytes(), shared.counters, sampled_ahead),
        rank_state=_read_rank_state(path / rank_file(dist.get_rank())) if same_layout else None,
    )


def _read_rank_state(file: Path) -> RankState:
    return RankState.from_bytes(file.read_bytes(), file)


def _make_folders(final: Path, temporary: Path, models: Mapping[str, LanguageModel]) -> None:
    if final.exists():
        raise ValueError(f"a step is saved once; {final} exists: remove it to save the step again")
    make_folder(final.parent)
    sweep_leftovers(final.parent)
    for name in (*(f"models/{name}" for name in models), "optimizer", "ranks"):
        make_folder(temporary / name)


class _Shared(BaseModel):
    """Content of `shared.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    counters: dict[str, JsonValue]
    scheduler: dict[str, JsonValue]


def _read_shared(file: Path) -> _Shared:
    try:
        return _Shared.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{file} is not of a checkpoint: {error.errors()[0]['msg']}; take an intact one") from error


def _write_shared(temporary: Path, shared: SharedState, scheduler: OptimizerParamScheduler) -> None:
    content = {"counters": dict(shared.counters), "scheduler": scheduler.state_dict()}
    write_text(temporary / _SHARED, json.dumps(content, indent=2))
    write_bytes(temporary / _DATA_POSITION, shared.data_position)
    if shared.sampled_ahead:
        write_bytes(temporary / _SAMPLED_AHEAD, shared.sampled_ahead)


def _saved_layout(models: Mapping[str, LanguageModel]) -> SavedLayout:
    layout = models[POLICY].layout
    return SavedLayout(tp=layout.tp, pp=layout.pp, dp=layout.dp, sp=layout.sp, cp=layout.cp)


def _manifest(temporary: Path, step: int, num_updates: int, models: Mapping[str, LanguageModel]) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=step,
        num_updates=num_updates,
        layout=_saved_layout(models),
        models=tuple(sorted(models)),
        float32_weights=all(weight.dtype == torch.float32 for weight in models[POLICY].parameters()),
        versions={package: version(package) for package in _PACKAGES},
        files=_hash_together(temporary),
    )


def _hash_together(temporary: Path) -> dict[str, FileRecord]:
    """Hash every file written so far, split over the ranks; reading back also shows that the files exist."""
    names = broadcast_record(list_files(temporary), source_rank=0, group=world())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine: dict[str, FileRecord] = {}
    with all_or_none(f"reading back {temporary}"), writing(temporary):
        mine = hash_files(temporary, names[rank::world_size])
    shares: list[dict[str, FileRecord]] = [{}] * world_size
    dist.all_gather_object(shares, mine)
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
