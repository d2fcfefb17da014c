"""Which model it was: a short hash over the content of everything that a Hugging Face folder says about it.

The same for a copy of the folder, another for an export that replaced it. The ranks share the reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# Weights, configuration, tokenizer and chat template; a README or a training log is not the model.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


_DIGITS = 16  # of a hash that a person may have to read: 64 bits


def model_fingerprint(folder: Path, on_file: Callable[[str], None]) -> str:
    """16 hexadecimal digits, the same on every rank. Collective on the whole job.

    Args:
        on_file: called with the name of a file before it is read.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES)
    mine: dict[str, str] = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        on_file(name)
        with (folder / name).open("rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    digests = {name: digest for part in parts for name, digest in part.items()}
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in names).encode()).hexdigest()[:_DIGITS]
