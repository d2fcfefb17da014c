"""Transformer Engine's attention, with torch's for cached decoding. Import it only with Transformer Engine."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_rlt.models.attention import attend_rows

_SHORTEST = 128


class FusedAttention(TEDotProductAttention):  # type: ignore[misc]
    """Fused causal attention; cached chunks, which have an explicit mask, use scaled_dot_product_attention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Shapes as in `PackedAttention.forward`."""
        if attn_mask_type == AttnMaskType.arbitrary:
            return attend_rows(query, key, value, attention_mask, scale=self.config.softmax_scale)
        output: Tensor = super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=None if packed_seq_params is None else _few_lengths(packed_seq_params),
        )
        return output


def _few_lengths(packed: PackedSeqParams) -> PackedSeqParams:
    """The longest sequence's length, rounded up to a power of two.

    cuDNN compiles a graph for every value of it, and packs differ in it; lengths themselves are in `cu_seqlens`.
    """
    longest = 1 << (max(packed.max_seqlen_q, _SHORTEST) - 1).bit_length()
    return replace(packed, max_seqlen_q=longest, max_seqlen_kv=longest)
