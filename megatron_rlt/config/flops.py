"""Model FLOP of a model call from shapes and counts alone; `models/flops.py` counts those of given sequences.

A multiply-add counts 2. Counted: each layer's products per token, attention over the causal half of each sequence, and
the output layer for the wanted rows at the unpadded vocabulary.
"""

from __future__ import annotations

from megatron_rlt.config.architecture import Architecture

BACKWARD_PASSES = 2  # each product needs two in the backward pass: for its input and for its weight


def causal_pairs(length: float) -> float:
    """Query-key pairs under a causal mask."""
    return length * (length + 1) / 2


def call_flops(architecture: Architecture, *, num_tokens: float, num_pairs: float, num_rows: float) -> float:
    """FLOP for `num_pairs` query-key pairs over all sequences and logits of `num_rows` tokens."""
    heads_size = architecture.num_heads * architecture.head_dim
    key_value_size = 2 * architecture.num_kv_heads * architecture.head_dim
    layer = architecture.hidden_size * (2 * heads_size + key_value_size + 3 * architecture.ffn_size)
    return (
        2.0 * architecture.num_layers * layer * num_tokens
        + 4.0 * architecture.num_layers * heads_size * num_pairs  # scores and weighted values
        + 2.0 * architecture.hidden_size * architecture.vocab_size * num_rows
    )
