"""Rotary frequencies, bit-equal to transformers' in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rlt.config.architecture import Architecture


def rope_frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Inverse frequencies `[head_dim / 2]` fp32 on the CPU, and the factor on cosine and sine (not 1 for yarn only).

    Scaled kinds come from transformers' ROPE_INIT_FUNCTIONS, which read only these fields of a configuration.
    """
    if architecture.rope_scaling is None:
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float) / architecture.head_dim
        return 1.0 / (architecture.rope_theta**exponents), 1.0
    config = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters={**architecture.rope_scaling, "rope_theta": architecture.rope_theta},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[architecture.rope_scaling["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)
