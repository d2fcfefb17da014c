"""Short content hashes that identify a model folder or a data set, wherever it is copied."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.folders.description import is_hugging_face, tokenizer_in
from megatron_rlt.config.folders.kind import NEMO_CONTEXT, find_model
from megatron_rlt.data.rows import source_digest
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.types import OnProgress

# Weights, configuration, tokenizer and chat template, but no README or training log.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def short_hash(digest: str) -> str:
    """The first 16 hexadecimal digits (64 bits) of a hash that people may have to read."""
    return digest[:16]


def model_fingerprint(folder: Path, on_file: OnProgress) -> str:
    """Short hash over a model folder, the same on every rank; ranks share the reading. Collective on the whole job.

    `on_file` is called with the name of each file before it is read.
    """
    files = _files(folder)
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


def _files(folder: Path) -> dict[str, Path]:
    """The files that make a model what it is, by name; of a checkpoint its weights and metadata, not the optimizer."""
    if is_hugging_face(folder):
        return {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES}
    found = find_model(folder)
    places = {found.weights, tokenizer_in(folder), *(path for path in (found.folder / NEMO_CONTEXT,) if path.is_dir())}
    return {f"{place.name}/{path.name}": path for place in places for path in place.iterdir() if path.is_file()}


def rows_fingerprint(source: str) -> str:
    """Short hash of a file or data set, which one rank reads. Collective on the whole job."""
    digest = source_digest(source) if dist.get_rank() == 0 else ""
    return short_hash(broadcast_record(digest, source_rank=0, group=world()))
