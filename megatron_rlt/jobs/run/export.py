"""Exports a trained model as a folder of one kind, with the configuration and tokenizer of the model it began with."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.folders.description import describe_model, is_hugging_face
from megatron_rlt.config.folders.kind import Kind
from megatron_rlt.convert.targets import Model, write_model
from megatron_rlt.convert.whole_folder import whole_folder
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.export import Destination, export_tensors, save_hf_folder


def export_model(model: LanguageModel, source: Path, target: Path, kind: Kind, *, max_shard_bytes: int) -> None:
    """Write the model; global rank 0 writes beside the target and renames. Collective.

    Raises:
        ValueError: the kind cannot express the model, which the configuration's rules find earlier.
    """
    if kind is Kind.HF and is_hugging_face(source):
        save_hf_folder(model, source, target, max_shard_bytes=max_shard_bytes)
        return
    tensors = export_tensors(model, destination=Destination.RANK_ZERO)
    if dist.get_rank() == 0:
        with whole_folder(target) as partial:
            write_model(kind, partial, tensors, Model.of(describe_model(source)), max_shard_bytes=max_shard_bytes)
    else:
        for _ in tensors:
            raise AssertionError("only global rank 0 receives tensors")
    dist.barrier()
