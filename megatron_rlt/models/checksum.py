"""A tensor's identity as text, by which two programs compare what they hold."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    values = tensor.detach().cpu().contiguous()
    head = f"{values.dtype} {tuple(values.shape)} ".encode()
    return hashlib.sha256(head + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def checksums_held(model: torch.nn.Module, names: list[str]) -> dict[str, str]:
    """Of those of the named parameters that a model holds under these very names."""
    held = dict(model.named_parameters())
    return {name: checksum(held[name]) for name in names if name in held}
