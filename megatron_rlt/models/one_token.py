"""Decodes one new token per row through a pipeline stage without Megatron's module calls.

For one token of a small model those calls cost more than the arithmetic. The operations, weights and order are the
modules', so results are bit-equal (`tests/models/test_one_token.py`). Only for `spec.py`'s local layers, not for
Transformer Engine's; `decoding.py` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rlt.models.attention import attend_one_token, rotate
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout


def run_one_token(model: LanguageModel, token_ids: Tensor, received: Tensor | None, cache: KeyValueCache) -> Tensor:
    """Run this stage on one token of every row, between the cache's `begin` and `commit`. Collective over tp.

    Args:
        token_ids: `[B, 1]` int64.
        received: `[1, B, H]` from the previous stage, None on the first stage.

    Returns:
        `[1, B, H]`, as from `LanguageModel`.
    """
    hidden = model.embedding(token_ids, cache.positions)[0] if received is None else received[0]
    cos, sin = cache.rotation(model.rotary_pos_emb(cache.max_sequence_length), hidden.dtype)
    # Once for all layers: each would convert a bool mask to this.
    bias = torch.zeros_like(cache.mask, dtype=hidden.dtype).masked_fill_(cache.mask, float("-inf"))
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        heads = _attend(attention, layer.input_layernorm(hidden), cache, (cos[0], sin[0], bias))
        hidden = hidden + _sum_over_tp(heads @ attention.linear_proj.weight.t(), model.layout)
        gate, up = (layer.pre_mlp_layernorm(hidden) @ mlp.linear_fc1.weight.t()).chunk(2, dim=-1)
        hidden = hidden + _sum_over_tp((F.silu(gate) * up) @ mlp.linear_fc2.weight.t(), model.layout)
    if model.decoder.final_layernorm is not None:
        hidden = model.decoder.final_layernorm(hidden)
    return hidden[None]


def _attend(
    attention: Any,  # noqa: ANN401 - Megatron's SelfAttention, which has no types
    hidden: Tensor,
    cache: KeyValueCache,
    positions: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """One layer's attention before its output projection: `[B, H]` to `[B, heads * D]`.

    `positions` holds cosine and sine `[B, 1, D]` and the additive mask `[B, 1, 1, S_key]`.
    """
    cos, sin, bias = positions
    mixed = hidden @ attention.linear_qkv.weight.t()
    if attention.linear_qkv.bias is not None:
        mixed = mixed + attention.linear_qkv.bias
    # Each group of heads has its queries, then its key, then its value.
    groups = attention.num_query_groups_per_partition
    mixed = mixed.view(hidden.size(0), groups, -1, attention.hidden_size_per_attention_head)
    query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    if attention.config.qk_layernorm:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    keys, values = cache.append(attention.layer_number, key[None], value[None])
    return attend_one_token(query, keys, values, bias, scale=attention.core_attention.scale)


def _sum_over_tp(partial: Tensor, layout: Layout) -> Tensor:
    if layout.tp > 1:
        dist.all_reduce(partial, group=layout.tp_group)
    return partial
