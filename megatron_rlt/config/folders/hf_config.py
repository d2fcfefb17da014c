"""A Hugging Face config.json for an architecture that was described by other metadata."""

from __future__ import annotations

from typing import Any

from megatron_rlt.config.architecture import Architecture

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def hf_config(architecture: Architecture) -> dict[str, Any]:
    """Keys that transformers 4 and 5 read; `Architecture.from_folder` reads them back to an equal record."""
    scaling = {} if architecture.rope_scaling is None else {"rope_scaling": dict(architecture.rope_scaling)}
    biases = {} if architecture.family == "qwen2" else {"attention_bias": False}
    return {
        "architectures": [_CLASSES[architecture.family]],
        "model_type": architecture.family,
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_positions,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tied_embeddings,
        "hidden_act": "silu",
        **biases,
        **scaling,
    }
