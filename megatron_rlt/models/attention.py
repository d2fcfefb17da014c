"""Attention on torch's scaled_dot_product_attention, for Megatron's core-attention slot, and its cached form.

`PackedAttention` supports what Megatron's local attention does not: packed sequences (thd), whole or split over
context-parallel ranks, grouped queries without copies of keys, and an explicit mask for cached decoding.
`CachedSelfAttention` is Megatron's self-attention with a `KeyValueCache`. `spec.py` chooses between them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.zigzag import zigzag_chunks, zigzag_whole

# Query block of a context-parallel sequence: the mask has this many rows, however long the sequence is.
_QUERY_BLOCK = 256


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of one layer over this rank's heads; no parameters, no dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # noqa: ANN401 - layer number and groups, which Megatron passes and nothing here needs
    ) -> None:
        super().__init__(config=config)
        is_causal = attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert is_causal, "only causal self-attention is built here"
        assert softmax_scale is not None, "the configuration must state the softmax scale"
        self.scale = softmax_scale
        self.cp_group: dist.ProcessGroup = pg_collection.cp

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
            query: `[T / cp, heads, D]` packed, else `[S, B, heads, D]`; key and value have this rank's kv heads, and
                in cached decoding their own, longer S.
            attention_mask: read only when `attn_mask_type` is `arbitrary`: `[B, 1, S, S_key]`, True where masked.

        Returns:
            `[T, heads * D]` packed, else `[S, B, heads * D]`.
        """
        assert attention_bias is None, "attention bias is not supported"
        if packed_seq_params is not None:
            boundaries = packed_seq_params.cu_seqlens_q.tolist()
            if self.cp_group.size() > 1:
                return attend_cut(query, key, value, boundaries, cp_group=self.cp_group, scale=self.scale)
            return attend_packed(query, key, value, boundaries, scale=self.scale)
        mask = attention_mask if attn_mask_type == AttnMaskType.arbitrary else None
        return attend_rows(query, key, value, mask, scale=self.scale)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], *, scale: float) -> Tensor:
    """Causal attention within each packed sequence: `[T, heads, D]` -> `[T, heads * D]`; `boundaries` as cu_seqlens."""
    lengths = [stop - start for start, stop in itertools.pairwise(boundaries) if stop > start]
    # Split, not sliced: the gradient of a slice is a tensor as large as the whole pack.
    parts = zip(*(torch.split(part, lengths) for part in (query, key, value)), strict=True)
    outputs = [_attend(*(one.transpose(0, 1)[None] for one in each), mask=None, scale=scale)[0] for each in parts]
    return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1)


def attend_cut(
    query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], *, cp_group: dist.ProcessGroup, scale: float
) -> Tensor:
    """`attend_packed` for this rank's queries, each sequence split as in `zigzag`. Collective over `cp_group`.

    The forward pass all-gathers keys and values; the backward pass reduce-scatters their gradients.

    Args:
        query: `[T / cp, heads, D]`, as key and value.
        boundaries: cu_seqlens of the whole sequences, from 0 to T; lengths are multiples of 2 x cp.
    """
    cp = cp_group.size()
    both = torch.cat([key, value], dim=-1)
    everyones = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=cp_group)
    parts = everyones.unflatten(0, (cp, -1))
    staircase = _staircase(max(stop - start for start, stop in itertools.pairwise(boundaries)), like=query)
    outputs = []
    for start, stop in itertools.pairwise([boundary // cp for boundary in boundaries]):
        keys, values = zigzag_whole(parts[:, start:stop]).transpose(0, 1)[None].chunk(2, dim=-1)
        for chunk, number in zip(query[start:stop].chunk(2), zigzag_chunks(cp, cp_group.rank()), strict=True):
            outputs += _attend_chunk(chunk, keys, values, number * len(chunk), staircase, scale=scale)
    return torch.cat(outputs).flatten(1)


def _attend_chunk(
    query: Tensor, keys: Tensor, values: Tensor, offset: int, staircase: Tensor, *, scale: float
) -> list[Tensor]:
    """Causal attention of queries `[S, heads, D]`, the first at position `offset`: blocks of `[rows, heads, D]`.

    `keys` and `values` `[1, kv_heads, L, D]` are the whole sequence's.
    """
    blocks = []
    for block in torch.split(query.transpose(0, 1)[None], _QUERY_BLOCK, dim=2):
        stop = offset + block.size(2)
        first = staircase.size(1) - staircase.size(0) - offset
        mask = staircase[: block.size(2), first : first + stop]
        output = _attend(block, keys[:, :, :stop], values[:, :, :stop], mask=mask, scale=scale)
        blocks.append(output[0].transpose(0, 1))
        offset = stop
    return blocks


def _staircase(longest: int, *, like: Tensor) -> Tensor:
    """Additive causal mask `[rows, longest + rows]`; a block at `offset` reads it from column `longest - offset` on.

    So one tensor serves every block of every sequence.
    """
    rows = min(_QUERY_BLOCK, longest)
    ones = torch.ones(rows, longest + rows, dtype=torch.bool, device=like.device)
    return torch.zeros_like(ones, dtype=like.dtype).masked_fill_(ones.triu_(longest + 1), float("-inf"))


def attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Attention of a batch: `[S, B, heads, D]` -> `[S, B, heads * D]`; causal when `mask` is None.

    Args:
        mask: `[B, 1, S, S_key]` bool, True where masked.
    """
    if mask is not None and query.size(0) == 1:
        return attend_one_token(query[0], key, value, ~mask, scale=scale)[None]
    rows = (part.permute(1, 2, 0, 3) for part in (query, key, value))
    output = _attend(*rows, mask=None if mask is None else ~mask, scale=scale)
    return output.permute(2, 0, 1, 3).flatten(2)


def attend_one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """`attend_rows` for one new token per row: `[B, heads, D]` -> `[B, heads * D]`.

    The query heads of a group take the sequence dimension: not every device has a kernel for grouped queries with a
    mask, and without one torch would copy the whole cache.

    Args:
        key: `[S_key, B, kv_heads, D]`, as `value`.
        mask: `[B, 1, 1, S_key]`, True where a query attends, or added to its scores.
    """
    num_rows, num_heads, head_dim = query.shape
    grouped = query.reshape(num_rows, key.size(2), num_heads // key.size(2), head_dim)
    output = _attend(grouped, *(part.permute(1, 2, 0, 3) for part in (key, value)), mask=mask, scale=scale)
    return output.reshape(num_rows, num_heads * head_dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """`[B, heads, S, D]` in and out; `mask` is True where a query attends, or added to its scores."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.size(1) != key.size(1)
    )


class CachedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention with a `KeyValueCache`, so that rows of different lengths decode together.

    Megatron's own static context keeps one offset for the whole batch. Here queries and keys are rotated by the
    absolute positions of their row, and the cache's mask restricts what each query attends to.
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
    """Rotary position embedding (halves convention) of `[..., B, heads, D]` by `[..., B, 1, D]`."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
