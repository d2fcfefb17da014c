"""Short content hashes that identify a model folder or a data set, wherever it is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.folders.description import is_hugging_face, tokenizer_in
from megatron_rlt.config.folders.kind import NEMO_CONTEXT, find_model
from megatron_rlt.config.models import ModelConfig
from megatron_rlt.data.rows import source_digest
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.types import OnProgress

# Weights, configuration, tokenizer and chat template, but no README or training log.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_WEIGHTS = ".safetensors"


def short_hash(digest: str) -> str:
    """The first 16 hexadecimal digits (64 bits) of a hash that people may have to read."""
    return digest[:16]


def model_fingerprint(folder: Path, on_file: OnProgress, *, with_weights: bool = True) -> str:
    """Short hash over a model folder, the same on every rank; ranks share the reading. Collective on the whole job.

    Args:
        on_file: called with the name of each file before it is read.
        with_weights: False leaves configuration, tokenizer and chat template.
    """
    files = _files(folder, with_weights=with_weights)
    names = sorted(files)
    mine: dict[str, str] = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        on_file(name)
        with files[name].open("rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    digests = {name: digest for part in parts for name, digest in part.items()}
    return short_hash(hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in names).encode()).hexdigest())


def training_contents(models: Mapping[str, ModelConfig], trained: str, on_file: OnProgress) -> dict[str, str]:
    """Hashes of what a training run reads besides its checkpoints, by the names that a refusal uses. Collective.

    Every frozen model counts as a whole. Of the model that is trained its weights do not count: they are in the
    checkpoints.
    """
    contents = {}
    for name, model in models.items():
        if name == trained:
            contents[f"tokenizer and configuration of {name}"] = model_fingerprint(
                model.model, on_file, with_weights=False
            )
        else:
            contents[f"content of {name}"] = model_fingerprint(model.model, on_file)
    return contents


def _files(folder: Path, *, with_weights: bool) -> dict[str, Path]:
    """The files that make a model what it is, by name; of a checkpoint its weights and metadata, not the optimizer."""
    if is_hugging_face(folder):
        suffixes = [suffix for suffix in _SUFFIXES if with_weights or suffix != _WEIGHTS]
        return {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes}
    found = find_model(folder)
    places = {tokenizer_in(folder), *(path for path in (found.folder / NEMO_CONTEXT,) if path.is_dir())}
    places |= {found.weights} if with_weights else set()
    return {f"{place.name}/{path.name}": path for place in places for path in place.iterdir() if path.is_file()}


def rows_fingerprint(source: str) -> str:
    """Short hash of a file or data set, which one rank reads. Collective on the whole job."""
    digest = source_digest(source) if dist.get_rank() == 0 else ""
    return short_hash(broadcast_record(digest, source_rank=0, group=world()))
