"""A model's parallel layout: its own Megatron process groups, separate from those of the job's other models.

Megatron has one global parallel state (`megatron.core.parallel_state`). A `Layout` owns a snapshot of it, and installs
it for the duration of a call: `with layout: model(...)`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed

from megatron_rlt.config.models import LayoutConfig

_STATE_PREFIXES = ("_MPU_", "_VIRTUAL_")


class Layout:
    """Groups, ranks and sizes of one model on this rank. Build with `build_layout`.

    `dp` counts replicas of tp x pp x cp ranks, over which sequences are split. `dp_cp` counts the ranks with the same
    weights, over which gradients are summed (Megatron's data-parallel group with context parallelism).
    """

    def __init__(self, config: LayoutConfig, state: dict[str, Any]) -> None:
        self.tp, self.pp, self.sp, self.cp = config.tp, config.pp, config.sp, config.cp
        self.tp_group: dist.ProcessGroup = state["_TENSOR_MODEL_PARALLEL_GROUP"]
        self.pp_group: dist.ProcessGroup = state["_PIPELINE_MODEL_PARALLEL_GROUP"]
        self.dp_group: dist.ProcessGroup = state["_DATA_PARALLEL_GROUP"]
        self.cp_group: dist.ProcessGroup = state["_CONTEXT_PARALLEL_GROUP"]
        self.dp_cp_group: dist.ProcessGroup = state["_DATA_PARALLEL_GROUP_WITH_CP"]
        self.dp: int = self.dp_group.size()
        self.dp_cp: int = self.dp_cp_group.size()
        self.tp_rank: int = self.tp_group.rank()
        self.pp_rank: int = self.pp_group.rank()
        self.dp_rank: int = self.dp_group.rank()
        self.cp_rank: int = self.cp_group.rank()
        self.dp_cp_rank: int = self.dp_cp_group.rank()
        self._state = state
        self._outer: list[dict[str, Any]] = []

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage with this rank's tp, cp and dp ranks."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)

    def __enter__(self) -> Layout:
        self._outer.append(_read_state())
        _write_state(self._state)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _write_state(self._outer.pop())

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} dp{self.dp}" + (f" cp{self.cp}" if self.cp > 1 else "") + (" sp" * self.sp)


def build_layout(config: LayoutConfig, *, seed: int = 0) -> Layout:
    """Create the groups of one model. Collective on all ranks, in the same order for several models.

    `seed`: of Megatron's model-parallel random-number tracker. Raises ValueError if the number of ranks is not a
    multiple of tp x pp x cp.
    """
    world_size = dist.get_world_size()
    if world_size % (config.tp * config.pp * config.cp) != 0:
        raise ValueError(
            f"the number of ranks must be a multiple of tp x pp x cp; got {world_size} ranks for tp={config.tp}, "
            f"pp={config.pp}, cp={config.cp}: change world_size or the layout"
        )
    before = _read_state()
    _write_state(dict.fromkeys(before))
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tp,
            pipeline_model_parallel_size=config.pp,
            context_parallel_size=config.cp,
            create_gloo_process_groups=False,
        )
        # Models draw no random numbers on the device (dropout is 0): the inference tracker makes forks free.
        initialize_rng_tracker(inference_rng_tracker=True)
        model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)
        return Layout(config, _read_state())
    finally:
        _write_state(before)


def _is_state(name: str, value: object) -> bool:
    return (name.isupper() and name.startswith("_") and not callable(value)) or name.startswith(_STATE_PREFIXES)


def _read_state() -> dict[str, Any]:
    return {name: value for name, value in vars(parallel_state).items() if _is_state(name, value)}


def _write_state(state: dict[str, Any]) -> None:
    vars(parallel_state).update(state)
