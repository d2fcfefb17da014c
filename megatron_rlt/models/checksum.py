"""SHA-256 checksums of tensors, by which two processes compare their weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_rlt.models.fp8 import plain_parts


def checksum(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's dtype, shape and bytes; of a quantised tensor's codes and scales."""
    digest = hashlib.sha256()
    for part in plain_parts(tensor.detach()):
        values = part.cpu().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checksums_held(model: torch.nn.Module, names: list[str]) -> dict[str, str]:
    """Checksums by name of the named parameters; names that the model does not have are left out."""
    held = dict(model.named_parameters())
    return {name: checksum(held[name]) for name in names if name in held}
