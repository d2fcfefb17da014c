"""Maps every Megatron tensor to its Hugging Face tensors, their order, and its split under tensor parallelism.

One table with three rules serves import, export and weight sync. In: an `Architecture`. Out: `WeightPair`s with
global layer numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from megatron_rlt.config.architecture import Architecture


class Rule(StrEnum):
    """How the rows of a Megatron tensor are composed of Hugging Face tensors."""

    PLAIN = "plain"  # the same tensor under another name
    FUSED_QKV = "fused_qkv"  # per key-value head: the rows of its query heads, its key, its value
    GATED_MLP = "gated_mlp"  # all gate rows, then all up rows, in each tensor-parallel shard


class Split(StrEnum):
    """How tensor parallelism divides a tensor."""

    REPLICATED = "replicated"
    COLUMN = "column"  # output features: dim 0
    ROW = "row"  # input features: dim 1
    VOCABULARY = "vocabulary"  # dim 0, padded at the end to a multiple of tp

    @property
    def dim(self) -> int:
        return 1 if self is Split.ROW else 0


@dataclass(frozen=True)
class WeightPair:
    """One Megatron tensor and the Hugging Face tensors it holds."""

    megatron_names: tuple[str, ...]  # the local layer spec's name, then Transformer Engine's where it differs
    hf_shapes: Mapping[str, tuple[int, ...]]  # Hugging Face name -> whole shape, in the rule's order
    rule: Rule
    split: Split
    layer: int | None  # 0-based over all pipeline stages; None outside the layers

    @property
    def name(self) -> str:
        return self.megatron_names[0]


@dataclass(frozen=True)
class _Row:
    megatron: str | tuple[str, str]
    hf: dict[str, str]  # name -> dimensions by name
    rule: Rule = Rule.PLAIN
    split: Split = Split.REPLICATED
    only_if: Literal["always", "qkv_bias", "qk_norm", "tied", "untied"] = "always"


_EMBEDDING = {"model.embed_tokens.weight": "vocab hidden"}
_FIRST = (_Row("embedding.word_embeddings.weight", _EMBEDDING, split=Split.VOCABULARY),)

_LAYER = (
    _Row(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "query hidden",
            "self_attn.k_proj.weight": "key hidden",
            "self_attn.v_proj.weight": "key hidden",
        },
        Rule.FUSED_QKV,
        Split.COLUMN,
    ),
    _Row(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"},
        Rule.FUSED_QKV,
        Split.COLUMN,
        only_if="qkv_bias",
    ),
    _Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}, split=Split.ROW),
    _Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}, only_if="qk_norm"),
    _Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}, only_if="qk_norm"),
    _Row(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
        Rule.GATED_MLP,
        Split.COLUMN,
    ),
    _Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, split=Split.ROW),
    _Row(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), {"input_layernorm.weight": "hidden"}
    ),
    _Row(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), {"post_attention_layernorm.weight": "hidden"}
    ),
)

_LAST = (
    _Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
    _Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, split=Split.VOCABULARY, only_if="untied"),
    # The last of several pipeline stages holds its own copy of a tied embedding.
    _Row("output_layer.weight", _EMBEDDING, split=Split.VOCABULARY, only_if="tied"),
)


def weight_pairs(architecture: Architecture) -> tuple[WeightPair, ...]:
    """All tensors of the model: embedding, layers in order, final norm, output layer (tied: the embedding again)."""
    layers = [(row, layer) for layer in range(architecture.num_layers) for row in _LAYER]
    rows = [*((row, None) for row in _FIRST), *layers, *((row, None) for row in _LAST)]
    return tuple(pair for row, layer in rows if (pair := _pair(row, architecture, layer)) is not None)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor a Hugging Face folder of this architecture must hold, with its shape, in the table's order."""
    return {name: shape for pair in weight_pairs(architecture) for name, shape in pair.hf_shapes.items()}


def hf_views(pair: WeightPair, tensor: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """Views of a Megatron tensor or tensor-parallel shard, one per entry of `pair.hf_shapes`, in that order.

    A view holds this shard's rows of the Hugging Face tensor in order; a fused QKV view has its leading dimension split
    into heads, so reshape it to compare or copy.
    """
    if pair.rule is Rule.PLAIN:
        return (tensor,)
    if pair.rule is Rule.GATED_MLP:
        return tensor.chunk(2, dim=0)
    queries = architecture.num_heads // architecture.num_kv_heads
    groups = tensor.view(-1, queries + 2, architecture.head_dim, *tensor.shape[1:])
    return groups[:, :queries], groups[:, queries], groups[:, queries + 1]


def _pair(row: _Row, architecture: Architecture, layer: int | None) -> WeightPair | None:
    applies = {
        "always": True,
        "qkv_bias": architecture.qkv_bias,
        "qk_norm": architecture.qk_norm,
        "tied": architecture.tied_embeddings,
        "untied": not architecture.tied_embeddings,
    }
    if not applies[row.only_if]:
        return None
    sizes = {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_size,
        "head": architecture.head_dim,
        "query": architecture.num_heads * architecture.head_dim,
        "key": architecture.num_kv_heads * architecture.head_dim,
    }
    names = (row.megatron,) if isinstance(row.megatron, str) else row.megatron
    megatron_prefix, hf_prefix = ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    shapes = {hf_prefix + name: tuple(sizes[size] for size in dims.split()) for name, dims in row.hf.items()}
    return WeightPair(
        tuple(megatron_prefix + name for name in names), MappingProxyType(shapes), row.rule, row.split, layer
    )
