"""Exports a Megatron model's shards as whole Hugging Face tensors or as a folder; collective, one tensor at a time.

Names and rules come from `table`; `hf_writer` writes files.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.hf_writer import check_folders, write_folder
from megatron_rlt.models.weights.stage import stage_parameters
from megatron_rlt.models.weights.table import Split, WeightPair, hf_views, weight_pairs
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.layout import Layout
from megatron_rlt.parallel.platform import world


class Destination(StrEnum):
    """Ranks that receive an export's tensors."""

    ALL_RANKS = "all_ranks"  # every data-parallel replica gathers its own weights
    RANK_ZERO = "rank_zero"  # only global rank 0, from its own replica


def export_tensors(model: LanguageModel, *, destination: Destination) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor of the model once, whole, on the CPU, in the model's dtype.

    Order: embedding, layers in order, final norm, output layer (not of a tied model). Vocabulary padding is removed.
    A yielded tensor shares no memory with the model. Collective: every rank must exhaust the iterator. Ranks that
    receive nothing yield nothing, so with RANK_ZERO the loop's body must not call a collective.
    """
    architecture, layout = model.architecture, model.layout
    if destination is Destination.RANK_ZERO and layout.dp_cp_rank != 0:
        return
    held = stage_parameters(model)
    owners, dtype = _owners_and_dtype({name: parameter.dtype for name, (_, parameter) in held.items()}, layout)
    exported: set[str] = set()
    for pair in weight_pairs(architecture):
        if exported.issuperset(pair.hf_shapes):
            continue  # the last stage's copy of a tied embedding
        exported.update(pair.hf_shapes)
        owner = owners[pair.name]
        parts = None
        if layout.pp_rank == owner:
            parts = _whole_parts(pair, held[pair.name][1].detach(), architecture, layout, destination)
        for index, (name, shape) in enumerate(pair.hf_shapes.items()):
            part = parts[index] if parts is not None else torch.empty(shape, dtype=dtype)
            if destination is Destination.ALL_RANKS:
                if layout.pp > 1:
                    dist.broadcast(part, group=layout.pp_group, group_src=owner)
                yield name, part
            elif layout.tp_rank == 0:
                _send_to_first_stage(part, owner, layout)
                if layout.pp_rank == 0:
                    yield name, part


def save_hf_folder(model: LanguageModel, source_folder: Path, target_folder: Path, *, max_shard_bytes: int) -> None:
    """Write the model as a Hugging Face folder with the source's configuration and tokenizer files. Collective.

    Global rank 0 writes to a temporary folder beside the target and renames it when it is complete and on disk.

    Args:
        max_shard_bytes: tensor bytes per safetensors file; a larger tensor gets its own file.

    Raises:
        ValueError: on every rank, if the target exists or the source is no Hugging Face folder.
    """
    fault = check_folders(source_folder, target_folder) if dist.get_rank() == 0 else None
    if (fault := broadcast_record(fault, source_rank=0, group=world())) is not None:
        raise ValueError(fault)
    tensors = export_tensors(model, destination=Destination.RANK_ZERO)
    if dist.get_rank() == 0:
        write_folder(tensors, source_folder, target_folder, max_shard_bytes=max_shard_bytes)
    else:
        for _ in tensors:
            raise AssertionError("only global rank 0 receives tensors")
    dist.barrier()


def _owners_and_dtype(mine: dict[str, torch.dtype], layout: Layout) -> tuple[dict[str, int], torch.dtype]:
    """The first pipeline stage that holds each pair, by name, and the one dtype of all parameters."""
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
        whole = torch.cat([view.flatten(0, view.dim() - len(shape)) for view in views], dim=pair.split.dim)
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


def _send_to_first_stage(part: Tensor, owner: int, layout: Layout) -> None:
    """Send a tensor from its owner to the first stage's `part`; both are first tensor-parallel ranks of replica 0."""
    if owner != 0 and layout.pp_rank == owner:
        dist.send(part, group=layout.pp_group, group_dst=0)
    elif owner != 0 and layout.pp_rank == 0:
        dist.recv(part, group=layout.pp_group, group_src=owner)
