"""Chooses a layer's modules: Transformer Engine's where it is installed and there is a GPU, else Megatron's.

Both kinds have the same parameter names in checkpoints, and both decode with `KeyValueCache`. A frozen model's linear
layers may be FP8: Transformer Engine's own, or emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

from megatron_rlt.config.fp8 import Fp8Config, Linear
from megatron_rlt.models.attention import CachedSelfAttention, PackedAttention
from megatron_rlt.models.fp8_linear import EmulatedFp8Column, EmulatedFp8Row
from megatron_rlt.models.norm import RMSNorm


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether layers are Transformer Engine's, whose packed attention has no fp32 kernel."""
    return bool(HAVE_TE) and torch.cuda.is_available() and dtype == torch.bfloat16


def block_spec(
    *, layers: range, num_layers: int, qk_norm: bool, dtype: torch.dtype, fp8: Fp8Config | None
) -> TransformerBlockSubmodules:
    """One pipeline stage's layers, numbered from 0 over all `num_layers`, and the final norm for the last stage."""
    build, norm = (_transformer_engine_layer, _te_norm()) if uses_transformer_engine(dtype) else (_local_layer, RMSNorm)

    def is_fp8(layer: int, linear: Linear) -> bool:
        return fp8 is not None and fp8.quantises(linear, layer=layer, num_layers=num_layers)

    specs = [build(qk_norm=qk_norm, fp8=fp8, is_fp8=partial(is_fp8, layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _local_layer(*, qk_norm: bool, fp8: Fp8Config | None, is_fp8: Callable[[Linear], bool]) -> ModuleSpec:
    head_norm = RMSNorm if qk_norm else IdentityOp

    def linear(name: Linear, plain: type, emulated: type) -> type | ModuleSpec:
        return ModuleSpec(module=emulated, params={"fp8": fp8}) if is_fp8(name) else plain

    attention = SelfAttentionSubmodules(
        linear_qkv=linear("qkv", ColumnParallelLinear, EmulatedFp8Column),
        core_attention=PackedAttention,
        linear_proj=linear("proj", RowParallelLinear, EmulatedFp8Row),
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = MLPSubmodules(
        linear_fc1=linear("fc1", ColumnParallelLinear, EmulatedFp8Column),
        linear_fc2=linear("fc2", RowParallelLinear, EmulatedFp8Row),
    )
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


def _transformer_engine_layer(*, qk_norm: bool, fp8: Fp8Config | None, is_fp8: Callable[[Linear], bool]) -> ModuleSpec:
    """Megatron's own spec with this project's attention modules, and with what stays bfloat16 in an FP8 model."""
    from megatron_rlt.models.te_attention import FusedAttention

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer.submodules.self_attention.module = CachedSelfAttention
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.core_attention = FusedAttention
    if fp8 is not None:
        from megatron_rlt.models.te_fp8 import in_bf16

        places: tuple[tuple[Linear, Any], ...] = (("qkv", attention), ("proj", attention), ("fc1", mlp), ("fc2", mlp))
        for linear, submodules in places:
            if not is_fp8(linear):
                name = f"linear_{linear}"
                setattr(submodules, name, in_bf16(getattr(submodules, name)))
    return layer


def _te_norm() -> Any:  # noqa: ANN401 - a class of Megatron's, which has no types
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
