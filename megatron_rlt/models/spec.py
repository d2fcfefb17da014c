"""Chooses a layer's modules: Transformer Engine's where it is installed and there is a GPU, else Megatron's.

Both kinds have the same parameter names in checkpoints, and both decode with `KeyValueCache`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_rlt.models.attention import CachedSelfAttention, PackedAttention
from megatron_rlt.models.norm import RMSNorm


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether layers are Transformer Engine's, whose packed attention has no fp32 kernel."""
    return bool(HAVE_TE) and torch.cuda.is_available() and dtype == torch.bfloat16


def block_spec(*, num_layers: int, qk_norm: bool, dtype: torch.dtype) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm for the last stage."""
    if uses_transformer_engine(dtype):
        layer, norm = _transformer_engine_layer(qk_norm=qk_norm)
    else:
        layer, norm = _local_layer(qk_norm=qk_norm), RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(*, qk_norm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            # Checkpoints use Transformer Engine's names, whose norms are part of the next linear layer.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_layer(*, qk_norm: bool) -> tuple[ModuleSpec, Any]:
    """Megatron's own spec with this project's attention modules."""
    from megatron.core.extensions.transformer_engine import TENorm

    from megatron_rlt.models.te_attention import FusedAttention

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer.submodules.self_attention.module = CachedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = FusedAttention
    return layer, TENorm
