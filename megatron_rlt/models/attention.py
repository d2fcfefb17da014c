"""Attention on torch's scaled_dot_product_attention, for Megatron's core-attention slot, and its cached form.

`PackedAttention` takes what Megatron's local attention does not: packed sequences (thd), grouped queries without
copies of keys, and an explicit mask for cached decoding. `CachedSelfAttention` is Megatron's self-attention with
`KeyValueCache` behind it. Which of them a model uses is chosen in `spec.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlt.models.kv_cache import KeyValueCache


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of one layer over this rank's heads; no parameters, no dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None,
        **_: Any,  # noqa: ANN401 - layer number and groups, which Megatron passes and nothing here needs
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, "only causal self-attention is built here"
        assert attention_type == "self", "only causal self-attention is built here"
        assert softmax_scale is not None, "the configuration must state the softmax scale"
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each packed sequence, within each row, or under a mask.

        Args:
            query: `[T, heads, D]` packed, else `[S, B, heads, D]`; key and value alike with this rank's kv heads
                (cached decoding: with their own, longer S).
            attention_mask: read only when `attn_mask_type` is `arbitrary`: `[B, 1, S, S_key]`, True where masked.

        Returns:
            `[T, heads * D]` packed, else `[S, B, heads * D]`.
        """
        assert attention_bias is None, "attention bias is not supported"
        if packed_seq_params is not None:
            return attend_packed(query, key, value, packed_seq_params.cu_seqlens_q.tolist(), scale=self.scale)
        mask = attention_mask if attn_mask_type == AttnMaskType.arbitrary else None
        return attend_rows(query, key, value, mask, scale=self.scale)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], *, scale: float) -> Tensor:
    """Causal attention of sequences that lie end to end: `[T, heads, D]` -> `[T, heads * D]`.

    Args:
        boundaries: ascending positions where sequences begin and end, from 0 to T.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries) if stop > start]
    # Split, not sliced: the gradient of a slice is a tensor as large as the whole pack.
    parts = zip(*(torch.split(part, lengths) for part in (query, key, value)), strict=True)
    outputs = [_attend(*(one.transpose(0, 1)[None] for one in each), mask=None, scale=scale)[0] for each in parts]
    return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Attention of a batch of rows: `[S, B, heads, D]` -> `[S, B, heads * D]`; causal when `mask` is None.

    Args:
        mask: `[B, 1, S, S_key]` bool, True where a query must not look.
    """
    if mask is not None and query.size(0) == 1:
        return attend_one_token(query[0], key, value, ~mask, scale=scale)[None]
    rows = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    output = _attend(*rows, mask=None if mask is None else ~mask, scale=scale)
    return output.permute(2, 0, 1, 3).flatten(2)


def attend_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """`attend_rows` for one new token a row: the query heads of a group stand where queries of a sequence would.

    Kernels that take a mask do not take grouped queries on every device; torch would then copy the whole cache.

    Args:
        query: `[B, heads, D]`.
        key: `[S_key, B, kv_heads, D]`, as `value`.
        mask: `[B, 1, 1, S_key]`, True where a query may look, or what is added to its scores.

    Returns:
        `[B, heads * D]`.
    """
    num_rows, num_heads, head_dim = query.shape
    grouped = query.reshape(num_rows, key.size(2), num_heads // key.size(2), head_dim)
    output = _attend(grouped, *(part.permute(1, 2, 0, 3) for part in (key, value)), mask=mask, scale=scale)
    return output.reshape(num_rows, num_heads * head_dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """`[B, heads, S, D]`; `mask` is True where a query may look, or what is added to its scores."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.size(1) != key.size(1)
    )


class CachedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention, in which rows of different lengths decode together behind a `KeyValueCache`.

    Megatron's own static context keeps one offset for the whole batch. Here every row has its own: queries and
    keys are rotated by the row's absolute positions before the keys are stored, and the cache's mask tells
    the core attention where each query may look.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: KeyValueCache | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: tuple[Tensor, Tensor],
        *_: object,
        **__: object,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, AttnMaskType, None]:
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        cos, sin = inference_context.rotation(rotary_pos_emb[0], query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, AttnMaskType.arbitrary, None


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention: `[..., B, heads, D]` by `[..., B, 1, D]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
