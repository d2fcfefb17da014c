"""The shards of a Megatron model -> Hugging Face tensors and folders: collective, one tensor at a time.

In: a model, its architecture and layout. Out: whole tensors under their Hugging Face names on the CPU, or a folder
that transformers reads. Names and rules come from `table`, files from `hf_writer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.weights.hf_writer import check_folders, write_folder
from megatron_rlt.models.weights.stage import stage_parameters
from megatron_rlt.models.weights.table import Split, WeightPair, hf_views, weight_pairs
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.layout import Layout


class Destination(StrEnum):
    """Which ranks an export's tensors reach."""

    ALL_RANKS = "all_ranks"  # every data-parallel replica gathers its own
    RANK_ZERO = "rank_zero"  # global rank 0 only; replicas other than its own send nothing


def export_tensors(
    model: GPTModel, architecture: Architecture, layout: Layout, *, destination: Destination
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor of the model once, whole, on the CPU, in the model's dtype.

    Order: embedding, layers in order, final norm, output layer (not of a tied model). Vocabulary padding is cut.
    A yielded tensor shares no memory with the model. Collective: every rank must exhaust the iterator. Ranks that
    receive nothing yield nothing, so with RANK_ZERO no collective may run in the loop's body.
    """
    if destination is Destination.RANK_ZERO and layout.dp_cp_rank != 0:
        return
    held = stage_parameters(model, architecture)
    owners, dtype = _owners_and_dtype({name: parameter.dtype for name, (_, parameter) in held.items()}, layout)
    exported: set[str] = set()
    for pair in weight_pairs(architecture):
        if exported.issuperset(pair.hf_shapes):
            continue  # the last stage's copy of a tied embedding
        exported.update(pair.hf_shapes)
        owner = owners[pair.name]
        parts: list[Tensor] | None = None
        if layout.pp_rank == owner:
            parts = _whole_parts(pair, held[pair.name][1].detach(), architecture, layout, destination)
        for index, (name, shape) in enumerate(pair.hf_shapes.items()):
            part = parts[index] if parts is not None else torch.empty(shape, dtype=dtype)
            if destination is Destination.ALL_RANKS:
                yield name, _broadcast(part, owner, layout)
            elif layout.tp_rank == 0:
                _send_to_first_stage(part, owner, layout)
                if layout.pp_rank == 0:
                    yield name, part


def save_hf_folder(
    model: GPTModel,
    architecture: Architecture,
    source_folder: Path,
    target_folder: Path,
    layout: Layout,
    *,
    max_shard_bytes: int,
) -> None:
    """Write the model as a Hugging Face folder with the source's configuration and tokenizer files. Collective.

    Global rank 0 writes, into a temporary folder beside the target that is renamed when all is on disk: a folder of
    the target's name is complete. On return it is there.

    Args:
        max_shard_bytes: tensor bytes of one safetensors file; a larger tensor has a file of its own.

    Raises:
        ValueError: on every rank, if the target exists or the source is no Hugging Face folder.
    """
    world = dist.group.WORLD
    assert world is not None, "the process group is not started"
    fault = check_folders(source_folder, target_folder) if dist.get_rank() == 0 else None
    fault = broadcast_record(fault, source_rank=0, group=world)
    if fault is not None:
        raise ValueError(fault)
    tensors = export_tensors(model, architecture, layout, destination=Destination.RANK_ZERO)
    if dist.get_rank() == 0:
        write_folder(tensors, source_folder, target_folder, max_shard_bytes=max_shard_bytes)
    else:
        for _ in tensors:
            raise AssertionError("only global rank 0 receives tensors")
    dist.barrier()


def _owners_and_dtype(mine: dict[str, torch.dtype], layout: Layout) -> tuple[dict[str, int], torch.dtype]:
    """Pair name -> first pipeline stage that holds it, and the one dtype of all parameters."""
    by_stage: list[dict[str, torch.dtype]] = [{}] * layout.pp
    dist.all_gather_object(by_stage, mine, group=layout.pp_group)
    dtypes = {dtype for stage in by_stage for dtype in stage.values()}
    assert len(dtypes) == 1, f"the model's parameters have several dtypes: {dtypes}"
    owners = {name: stage for stage in reversed(range(layout.pp)) for name in by_stage[stage]}
    return owners, dtypes.pop()


def _whole_parts(
    pair: WeightPair, shard: Tensor, architecture: Architecture, layout: Layout, destination: Destination
) -> list[Tensor] | None:
    """The pair's Hugging Face tensors on the CPU; None where only the first tensor-parallel rank gathers."""
    shards = _gather_shards(pair.split, shard, layout, destination)
    if shards is None:
        return None
    by_shard = [hf_views(pair, part, architecture) for part in shards]
    wholes = []
    for views, shape in zip(zip(*by_shard, strict=True), pair.hf_shapes.values(), strict=True):
        flat = [view.flatten(0, view.dim() - len(shape)) for view in views]
        whole = torch.cat(flat, dim=pair.split.dim)
        wholes.append(whole[: shape[0]].contiguous() if pair.split is Split.VOCABULARY else whole)
        assert wholes[-1].shape == shape, f"{pair.name} gathers to {list(wholes[-1].shape)}, not {list(shape)}"
    return wholes


def _gather_shards(split: Split, shard: Tensor, layout: Layout, destination: Destination) -> list[Tensor] | None:
    shard = shard.contiguous()
    if split is Split.REPLICATED or layout.tp == 1:
        return [shard.cpu()]
    receives = destination is Destination.ALL_RANKS or layout.tp_rank == 0
    shards = [torch.empty_like(shard) for _ in range(layout.tp)] if receives else None
    if destination is Destination.ALL_RANKS:
        dist.all_gather(shards, shard, group=layout.tp_group)
    else:
        dist.gather(shard, shards, group_dst=0, group=layout.tp_group)
    return [part.cpu() for part in shards] if shards is not None else None


def _broadcast(part: Tensor, owner: int, layout: Layout) -> Tensor:
    if layout.pp > 1:
        dist.broadcast(part, group=layout.pp_group, group_src=owner)
    return part


def _send_to_first_stage(part: Tensor, owner: int, layout: Layout) -> None:
    """Move a tensor to the first stage's `part`; both ends are first tensor-parallel ranks of replica 0."""
    if owner == 0:
        return
    if layout.pp_rank == owner:
        dist.send(part, group=layout.pp_group, group_dst=0)
    elif layout.pp_rank == 0:
        dist.recv(part, group=layout.pp_group, group_src=owner)
