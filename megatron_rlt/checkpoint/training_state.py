"""What a checkpoint of a run holds, and how it is restored bit for bit.

`step-000007/` has one Megatron distributed checkpoint per model and one for the optimizer, one file per rank, shared
files and a manifest. All can be read in any layout except random-number states, which need the layout of the save, and
an optimizer saved as `tp_pp`, which needs its tp and pp. `saving` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from megatron_rlt.checkpoint.folders import CheckpointInfo, layout_fault
from megatron_rlt.checkpoint.manifest import SavedLayout, rank_file
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.sharded import load_model, load_optimizer
from megatron_rlt.checkpoint.torch_format import loading
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.language_model import LanguageModel

POLICY = "policy"  # name of the model that the optimizer trains
SHARED, DATA_POSITION, SAMPLED_AHEAD = "shared.json", "data_position.json", "sampled_ahead.bin"


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
                f"{SHARED} of the checkpoint says {repr(value)[:50]} for {name}, a number from 0: take an intact one"
            )
        return value


@dataclass(frozen=True)
class LoadedState:
    """A checkpoint's content besides tensors."""

    step: int
    num_updates: int
    shared: SharedState
    rank_state: RankState | None  # None if the layout has changed: random numbers belong to its shards


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
            program, or its optimizer belongs to another layout.
    """
    path, manifest = info.path, info.manifest
    if fault := layout_fault(path, manifest, saved_layout(models[POLICY])):
        raise ValueError(fault)
    if missing := sorted(set(models) - set(manifest.models)):
        raise ValueError(
            f"a run resumes with the models it was saved with; {path} holds {list(manifest.models)} but not {missing}: "
            "resume with the configuration of the saved run"
        )
    try:
        for name, model in models.items():
            load_model(model, path / "models" / name)
        load_optimizer(optimizer, models[POLICY], path / "optimizer", manifest.reshardable)
    except CheckpointingException as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds the state of other models than this run's: {reason}") from error
    shared = _read_shared(path / SHARED)
    scheduler.num_steps = 0  # Megatron's load adds the saved count to the present one
    with loading(path / SHARED):
        scheduler.load_state_dict(dict(shared.scheduler))
    sampled_ahead = (path / SAMPLED_AHEAD).read_bytes() if SAMPLED_AHEAD in manifest.files else b""
    same_layout = manifest.layout == saved_layout(models[POLICY])
    return LoadedState(
        step=manifest.step,
        num_updates=manifest.num_updates,
        shared=SharedState((path / DATA_POSITION).read_bytes(), shared.counters, sampled_ahead),
        rank_state=_read_rank_state(path / rank_file(dist.get_rank())) if same_layout else None,
    )


def _read_rank_state(file: Path) -> RankState:
    return RankState.from_bytes(file.read_bytes(), file)


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


def saved_layout(model: LanguageModel) -> SavedLayout:
    layout = model.layout
    return SavedLayout(tp=layout.tp, pp=layout.pp, dp=layout.dp, sp=layout.sp, cp=layout.cp)


def planned_layout(config: LayoutConfig, world_size: int) -> SavedLayout:
    """The layout that a model will have, before it is built."""
    dp = world_size // (config.tp * config.pp * config.cp)
    return SavedLayout(tp=config.tp, pp=config.pp, dp=dp, sp=config.sp, cp=config.cp)
