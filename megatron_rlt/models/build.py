"""Builds this rank's pipeline stage of a Megatron model from an architecture and a layout, without weights."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.fp8 import transformer_settings
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.rope import rope_frequencies
from megatron_rlt.models.spec import block_spec, uses_transformer_engine
from megatron_rlt.parallel.layout import Layout

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def build_model(
    architecture: Architecture, layout: Layout, *, dtype: torch.dtype, recompute: str, fp8: Fp8Config | None = None
) -> LanguageModel:
    """Build this rank's pipeline stage. Collective over the layout.

    Parameters are allocated but not initialised: `models.weights` fills them.

    Args:
        dtype: of parameters and activations.
        recompute: "none", "selective" or "full", as in the configuration.
        fp8: FP8 linear layers of a model that is not trained; None: none.
    """
    frequencies, rope_factor = rope_frequencies(architecture)
    config = transformer_config(
        architecture, layout, dtype=dtype, recompute=recompute, rope_factor=rope_factor, fp8=fp8
    )
    # Transformer Engine stores an FP8 weight twice, for two products, where gradients are on.
    with layout, nullcontext() if fp8 is None else torch.no_grad():
        num_layers = get_num_layers_to_build(config, vp_stage=None, pp_rank=layout.pp_rank)
        first = num_layers * layout.pp_rank  # stages have equal shares
        model = LanguageModel(
            config,
            block_spec(
                layers=range(first, first + num_layers),
                num_layers=architecture.num_layers,
                qk_norm=architecture.qk_norm,
                dtype=dtype,
                fp8=fp8,
            ),
            vocab_size=math.ceil(architecture.vocab_size / layout.tp) * layout.tp,
            architecture=architecture,
            layout=layout,
            fp8=fp8,
            max_sequence_length=architecture.max_positions,
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
        )
    if fp8 is not None and not fp8.activations:
        model.config.fp8 = None  # without Transformer Engine's context its linears dequantise FP8 weights at each call
    model.rotary_pos_emb.inv_freq = frequencies
    # Keeps the table whole: packs index it by the positions of their tokens, and decoding is never split.
    model.rotary_pos_emb.cp_group = None
    _mark_shards(model)
    return model


def _mark_shards(model: LanguageModel) -> None:
    """Mark weights that are shards for Megatron, which does so only in the initialisation that is skipped here.

    Gradient norms would treat unmarked shards of tensor-parallel ranks above 0 as copies of rank 0's and omit them.
    """
    split_dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        weight = module.weight if type(module) in split_dims else None
        if weight is not None and "tensor_model_parallel" not in vars(weight):
            set_tensor_model_parallel_attributes(weight, True, split_dims[type(module)], 1)


def transformer_config(
    architecture: Architecture,
    layout: Layout,
    *,
    dtype: torch.dtype,
    recompute: str,
    rope_factor: float,
    fp8: Fp8Config | None,
) -> TransformerConfig:
    """Megatron's configuration of the layers.

    Args:
        rope_factor: yarn's factor on cosine and sine. It scales queries and keys alike, so its square goes into the
            softmax scale.
    """
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        softmax_scale=rope_factor**2 / math.sqrt(architecture.head_dim),
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The trainer's losses carry their own global denominator.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        context_parallel_size=layout.cp,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,
        # Megatron requires this dispatcher for variable lengths, even without experts.
        moe_token_dispatcher_type="alltoall",
        **_device_settings(dtype),
        **_RECOMPUTE[recompute],
        **_fp8_settings(fp8, dtype),
    )


def _device_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Precision, and the fusions that need a GPU or Transformer Engine."""
    on_gpu, fused = torch.cuda.is_available(), uses_transformer_engine(dtype)
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": not on_gpu,
        "perform_initialization": False,
        # Transformer Engine picks its kernels by NVTE_ALLOW_NONDETERMINISTIC_ALGO and refuses this flag without it.
        "deterministic_mode": not fused,
        "apply_rope_fusion": fused,
        "bias_activation_fusion": on_gpu,
    }


def _fp8_settings(fp8: Fp8Config | None, dtype: torch.dtype) -> dict[str, Any]:
    """What Transformer Engine needs to know of FP8; emulated linears know it themselves."""
    if fp8 is None or not uses_transformer_engine(dtype):
        return {}
    from megatron_rlt.models.te_fp8 import check_scales

    check_scales(fp8)
    return transformer_settings(fp8)
