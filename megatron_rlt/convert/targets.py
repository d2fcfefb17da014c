"""Writes a model's tensors as a folder of one kind; the caller chooses a temporary place and renames it.

In: Hugging Face tensors in the table's order. Out: a folder that the tools of its kind read. `contexts` writes what
stands beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.description import ModelDescription
from megatron_rlt.config.folders.hf_config import hf_config
from megatron_rlt.config.folders.kind import Kind
from megatron_rlt.config.folders.optimizer_state import STATE_PREFIX, OptimizerState
from megatron_rlt.convert.contexts import Beside, beside_weights
from megatron_rlt.models.weights.chunk_writer import ChunkWriter
from megatron_rlt.models.weights.hf_writer import copy_side_files, write_config, write_weights
from megatron_rlt.models.weights.sources import join_pair, own_pairs
from megatron_rlt.models.weights.table import WeightPair

_LAYERS = "decoder.layers."
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Model:
    """What is written besides tensors."""

    architecture: Architecture
    hf_config: Mapping[str, Any]
    side_files: Path | None  # folder of tokenizer and generation settings
    source: str  # for messages

    @classmethod
    def of(cls, described: ModelDescription) -> Model:
        """Of a described folder; its own config.json where it has one."""
        config = hf_config(described.architecture)
        if described.hf_folder is not None:
            config = json.loads((described.hf_folder / _CONFIG).read_text(encoding="utf-8"))
        return cls(described.architecture, config, described.tokenizer, str(described.found.folder))


@dataclass(frozen=True)
class Optimizer:
    """Adam's state, to be written with the weights."""

    found: OptimizerState
    tensors: Mapping[str, Iterable[tuple[str, Tensor]]]  # by state, under the weights' Hugging Face names


def write_model(
    kind: Kind,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    model: Model,
    *,
    max_shard_bytes: int,
    optimizer: Optimizer | None = None,
) -> None:
    """Write an empty folder of one kind.

    Args:
        optimizer: only for Megatron-LM and Megatron-Bridge.

    Raises:
        ValueError: the kind cannot express the architecture, or the tensors have several dtypes where one is needed.
    """
    if kind is Kind.HF:
        dtype = write_weights(tensors, folder, max_shard_bytes)
        _copy_side_files(model, folder)
        write_config(model.hf_config, folder, dtype)
        return
    beside = beside_weights(
        kind,
        model.architecture,
        model.source,
        has_tokenizer=model.side_files is not None,
        optimizer=None if optimizer is None else optimizer.found,
    )
    weights = folder / beside.weights
    weights.mkdir(parents=True, exist_ok=True)
    with ChunkWriter(weights, max_file_bytes=max_shard_bytes) as writer:
        dtype = _write_chunks(writer, tensors, model.architecture, beside)
        _write_extra_states(writer, model.architecture.num_layers, beside)
        for state, moments in ({} if optimizer is None else optimizer.tensors).items():
            prefix = f"{STATE_PREFIX}{state}.{beside.prefix}"
            _write_chunks(writer, moments, model.architecture, replace(beside, prefix=prefix))
        writer.finish(dict(beside.common))
    _write_side_files(model, folder / beside.tokenizer)
    beside.write(folder, dtype)


def _write_chunks(
    writer: ChunkWriter, tensors: Iterable[tuple[str, Tensor]], architecture: Architecture, beside: Beside
) -> torch.dtype:
    """Write all tensors; returns the dtype of the last layers' matrices."""
    num_layers, dtype = architecture.num_layers, torch.float32
    for pair, whole in _joined(tensors, architecture):
        name, dtype = pair.megatron_names[-1], whole.dtype if whole.dim() > 1 else dtype
        if pair.layer is None:
            writer.add(beside.prefix + name, whole)
            if name == _EMBEDDING and architecture.tied_embeddings and beside.copies_tied_output:
                writer.add(beside.prefix + _OUTPUT, whole)
        else:
            stacked = _LAYERS + name.removeprefix(_LAYERS).partition(".")[2]
            writer.add(beside.prefix + stacked, whole, layer=pair.layer, num_layers=num_layers)
    return dtype


def _write_extra_states(writer: ChunkWriter, num_layers: int, beside: Beside) -> None:
    for linear in _LINEARS:
        for layer in range(num_layers):
            name = f"{beside.prefix}{_LAYERS}{linear}._extra_state"
            writer.add_empty_state(name, layer=layer, num_layers=num_layers)


def _joined(tensors: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[WeightPair, Tensor]]:
    """Megatron's tensors, each as soon as the last of its parts has come."""
    stream = iter(tensors)
    for pair in own_pairs(architecture):
        parts = dict(next(stream) for _ in pair.hf_shapes)
        assert parts.keys() == pair.hf_shapes.keys(), f"{list(parts)} came where {list(pair.hf_shapes)} was due"
        yield pair, join_pair(pair, parts, architecture)
    assert next(stream, None) is None, "more tensors came than the table has"


def _write_side_files(model: Model, folder: Path) -> None:
    """Tokenizer, generation settings and config.json, by which a way back to Hugging Face loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy_side_files(model, folder)
    (folder / _CONFIG).write_text(
        json.dumps(dict(model.hf_config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _copy_side_files(model: Model, folder: Path) -> None:
    if model.side_files is not None:
        copy_side_files(model.side_files, folder)
