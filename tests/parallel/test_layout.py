"""Layouts: two models with different tensor and pipeline parallelism on the same ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.parallel.layout import build_layout
from tests.ranks import run_ranks


def _two_layouts() -> dict[str, tuple[int, ...]]:
    teacher = build_layout(LayoutConfig(tp=2, sp=True))
    student = build_layout(LayoutConfig(pp=2))
    seen: dict[str, tuple[int, ...]] = {}
    with teacher:
        seen["teacher"] = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        with student:
            seen["student"] = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_rank(),
            )
        seen["back"] = (parallel_state.get_tensor_model_parallel_world_size(), teacher.tp_rank)
    value = torch.ones(1) * dist.get_rank()
    dist.all_reduce(value, group=teacher.tp_group)
    seen["sum"] = (int(value), student.last_stage_rank)
    assert not parallel_state.model_parallel_is_initialized()
    return seen


def _places() -> tuple[tuple[int, ...], ...]:
    layout = build_layout(LayoutConfig(cp=2))
    sizes = (layout.tp, layout.pp, layout.cp, layout.dp, layout.dp_cp)
    return sizes, (layout.cp_rank, layout.dp_rank, layout.dp_cp_rank, layout.last_stage_rank)


def test_context_parallel_ranks_share_a_replica_and_hold_the_same_weights() -> None:
    # Megatron counts cp before dp: rank = cp_rank + 2 x dp_rank.
    for rank, (sizes, places) in enumerate(run_ranks(_places, 4)):
        assert sizes == (1, 1, 2, 2, 4)
        assert places == (rank % 2, rank // 2, rank, rank)


def test_each_layout_is_current_only_inside_its_block() -> None:
    for rank, seen in enumerate(run_ranks(_two_layouts, 2)):
        assert seen == {"teacher": (2, 1), "student": (1, rank), "back": (2, rank), "sum": (1, 1)}
