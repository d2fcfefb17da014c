"""Loads a model folder of any kind into a Megatron model's shards. Not collective.

Of a Hugging Face folder every rank reads only its own part; of other kinds whole tensors, one at a time. Names and
rules come from `table`, file access from `hf_reader` and `sources`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.folders.description import ModelDescription
from megatron_rlt.models.fp8 import is_fp8, weight_writer
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.hf_reader import SliceRead, StoredTensor, check_census, copy_slices, read_headers
from megatron_rlt.models.weights.sources import open_weights
from megatron_rlt.models.weights.stage import stage_parameters
from megatron_rlt.models.weights.table import Split, WeightPair, hf_shapes, hf_views
from megatron_rlt.parallel.layout import Layout

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(model: LanguageModel, described: ModelDescription) -> None:
    """Fill this rank's parameters from a folder of any kind, as `load_hf_weights`."""
    if described.tensors is None:
        load_hf_weights(model, described.found.weights)
        return
    architecture, layout = model.architecture, model.layout
    _check_heads(described.found.folder, architecture, layout)
    source, write = open_weights(described), weight_writer(model)
    for pair, parameter in stage_parameters(model).values():
        shard = torch.empty(parameter.shape, dtype=model.config.params_dtype)
        parts = source.parts(pair)
        for read in _reads(pair, shard, architecture, layout):
            read.target.copy_(
                parts[read.name].narrow(read.dim, read.start, read.stop - read.start).reshape_as(read.target)
            )
        write(parameter, shard.to(parameter.device))


def load_hf_weights(model: LanguageModel, folder: Path) -> None:
    """Fill this rank's parameters, cast to their dtype; call before an optimizer copies them.

    Vocabulary rows beyond `architecture.vocab_size` become zero. A tied model's last pipeline stage fills its own copy
    of the embedding.

    Raises:
        ValueError: the folder's tensors differ from those that the architecture needs (all differences at once), a tied
            model's folder holds an output layer that differs from its embedding, or tp would split a key-value head.
    """
    architecture, layout = model.architecture, model.layout
    _check_heads(folder, architecture, layout)
    stored = read_headers(folder)
    check_census(folder, stored, hf_shapes(architecture), unused=(_OUTPUT,) if architecture.tied_embeddings else ())
    embedding_copies: list[SliceRead] = []
    reads: list[SliceRead] = []
    write = weight_writer(model)
    for pair, parameter in stage_parameters(model).values():
        if is_fp8(parameter):
            # A slice of a quantised tensor is a copy, so that a whole weight is read first, in the model's dtype.
            whole = torch.empty(parameter.shape, dtype=model.config.params_dtype, device=parameter.device)
            copy_slices(stored, _reads(pair, whole, architecture, layout))
            write(parameter, whole)
            continue
        new_reads = list(_reads(pair, parameter.detach(), architecture, layout))
        reads += new_reads
        if pair.split is Split.VOCABULARY and architecture.tied_embeddings:
            embedding_copies += new_reads
    copy_slices(stored, reads)
    if architecture.tied_embeddings and _OUTPUT in stored:
        _check_tied(folder, stored, embedding_copies)


def _check_heads(folder: Path, architecture: Architecture, layout: Layout) -> None:
    if architecture.num_kv_heads % layout.tp != 0:
        raise ValueError(
            f"{folder}: num_key_value_heads must be a multiple of tp, got {architecture.num_kv_heads} and "
            f"tp={layout.tp}; choose a tp that divides {architecture.num_kv_heads}"
        )


def _reads(pair: WeightPair, shard: Tensor, architecture: Architecture, layout: Layout) -> Iterator[SliceRead]:
    """The reads that fill one parameter's `shard`."""
    dim = pair.split.dim
    for (name, shape), view in zip(pair.hf_shapes.items(), hf_views(pair, shard, architecture), strict=True):
        if pair.split is Split.REPLICATED:
            yield SliceRead(name, 0, 0, shape[0], view)
        elif pair.split is Split.VOCABULARY:
            start = min(layout.tp_rank * len(shard), shape[0])
            stop = min(start + len(shard), shape[0])
            shard[stop - start :].zero_()
            yield SliceRead(name, 0, start, stop, view[: stop - start])
        else:
            assert shape[dim] % layout.tp == 0, f"{name} {shape} does not divide by tp={layout.tp}"
            part = shape[dim] // layout.tp
            yield SliceRead(name, dim, layout.tp_rank * part, (layout.tp_rank + 1) * part, view)


def _check_tied(folder: Path, stored: dict[str, StoredTensor], embedding: list[SliceRead]) -> None:
    """Refuse a stored output layer that differs from its tied embedding: transformers would use the stored one."""
    outputs = [SliceRead(_OUTPUT, read.dim, read.start, read.stop, torch.empty_like(read.target)) for read in embedding]
    copy_slices(stored, outputs)
    for read, output in zip(embedding, outputs, strict=True):
        if not torch.equal(read.target, output.target):
            raise ValueError(
                f"{folder}: config.json ties the output layer to the embedding, but {_OUTPUT} differs from "
                f"{_EMBEDDING}; set tie_word_embeddings to false, or remove {_OUTPUT} from the weights"
            )
