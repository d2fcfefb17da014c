"""SHA-256 checksums of tensors, by which two processes compare their weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and bytes."""
    values = tensor.detach().cpu().contiguous()
    head = f"{values.dtype} {tuple(values.shape)} ".encode()
    return hashlib.sha256(head + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def checksums_held(model: torch.nn.Module, names: list[str]) -> dict[str, str]:
    """Checksums by name of the named parameters; names that the model does not have are left out."""
    held = dict(model.named_parameters())
    return {name: checksum(held[name]) for name in names if name in held}
