"""Random tiny Hugging Face models: real transformers classes, saved as ordinary folders with safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The rope scaling of Llama 3.1."""


def tiny_hf_model(
    folder: Path,
    family: str,
    *,
    tied: bool,
    seed: int = 0,
    rope_scaling: dict[str, Any] | None = None,
    vocab_size: int = 131,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_size: int = 96,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float32,
    weight_scale: float = 0.12,
    max_shard_size: str = "50GB",
) -> Path:
    """Save a model whose every weight differs from its initial constant: biases are not 0, norms are not 1.

    The vocabulary size is odd, so that tensor parallelism has to pad it.
    """
    config_class, model_class = _FAMILIES[family]
    rope = {"rope_type": "default", **(rope_scaling or {}), "rope_theta": 10000.0}
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=ffn_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.dtype = dtype
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_values(name, parameter, generator, weight_scale))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _random_values(name: str, parameter: torch.Tensor, generator: torch.Generator, weight_scale: float) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.3 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return 0.3 * noise
    return 0.2 * noise if name.endswith("bias") else weight_scale * noise
