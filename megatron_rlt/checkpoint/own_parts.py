"""The optimizer's state as each rank holds it: one flat range of every weight of its shard, without any gathering.

A range belongs to the shard of one tp and pp position, so tp and pp must stay as they were. Ranges are cut anew for
another number of replicas, whatever Megatron's buckets are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_rlt.models.language_model import LanguageModel

_STEP = "step"  # Adam's counter stands among the parameter groups


def own_parts(part: Any, model: LanguageModel) -> dict[int, dict[str, ShardedTensor]]:  # noqa: ANN401 - untyped
    """Main weights and moments of one distributed optimizer, in its own order; the tensors are the optimizer's."""
    layout, names = model.layout, {weight: name for name, weight in model.named_parameters()}
    found = {}
    for index, (weight, start) in enumerate(_held(part)):
        state = part._get_main_param_and_optimizer_states(weight)
        place = f"tp{layout.tp_rank}.pp{layout.pp_rank}.{names[weight]}"
        found[index] = {
            kind: _range(f"optimizer.part.{kind}.{place}", values.detach(), weight.numel(), start)
            for kind, values in state.items()
            if kind != _STEP
        }
    return found


@torch.no_grad()
def restore_own_parts(part: Any, loaded: dict[int, dict[str, torch.Tensor]]) -> None:  # noqa: ANN401 - untyped
    """Overwrite main weights and moments with what was loaded into the form of `own_parts`."""
    for index, (weight, _) in enumerate(_held(part)):
        part._set_main_param_and_optimizer_states(weight, loaded[index])


def _held(part: Any) -> Iterator[tuple[torch.nn.Parameter, int]]:  # noqa: ANN401 - untyped
    """Weights of which this rank holds a range, and the range's first entry."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    yield weight, ranges["param"].start


def _range(key: str, values: torch.Tensor, num_entries: int, start: int) -> ShardedTensor:
    return ShardedTensor(
        key,
        values,
        values.dtype,
        tuple(values.shape),
        global_shape=(num_entries,),
        global_offset=(start,),
        axis_fragmentations=None,  # ranges are of any length
    )
