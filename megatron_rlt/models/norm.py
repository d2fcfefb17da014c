"""RMSNorm as transformers computes it, for Megatron's layer spec with or without sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rlt.parallel.platform import device


class RMSNorm(nn.Module):
    """`weight * x / rms(x)` over the last dimension, statistics in fp32.

    Megatron's local spec with torch's RMSNorm refuses sequence parallelism. The weight's attribute `sequence_parallel`
    suffices: Megatron then sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., H]` -> `[..., H]`, in the input's dtype."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(hidden.dtype)
