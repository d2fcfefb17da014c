"""Transformer Engine's attention, with torch's for cached decoding. Import it only with Transformer Engine."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_rlt.models.attention import attend_rows


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
            packed_seq_params=packed_seq_params,
        )
        return output
