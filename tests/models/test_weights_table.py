"""The three rules, by hand, and the names of both layer specs."""

from __future__ import annotations

import torch

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.weights.table import Rule, Split, WeightPair, hf_shapes, hf_views, weight_pairs


def _architecture(*, tied_embeddings: bool = False, qkv_bias: bool = False, qk_norm: bool = False) -> Architecture:
    return Architecture(
        family="llama",
        num_layers=2,
        hidden_size=3,
        ffn_size=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=1,
        vocab_size=7,
        tied_embeddings=tied_embeddings,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_epsilon=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_positions=16,
    )


def _pair(name: str, architecture: Architecture) -> WeightPair:
    return next(pair for pair in weight_pairs(architecture) if pair.name == name)


def test_fused_qkv_takes_queries_key_and_value_of_each_key_value_head_in_turn() -> None:
    architecture = _architecture(qkv_bias=True)
    pair = _pair("decoder.layers.1.self_attention.linear_qkv.bias", architecture)
    # Heads of size 1: key-value head 0 serves query heads 0 and 1, key-value head 1 serves 2 and 3.
    fused = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21])
    query, key, value = hf_views(pair, fused, architecture)
    assert list(pair.hf_shapes) == [f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"]
    assert query.flatten().tolist() == [0, 1, 2, 3]
    assert key.flatten().tolist() == [10, 11]
    assert value.flatten().tolist() == [20, 21]
    # One of two tensor-parallel shards: the second key-value head with its queries.
    assert [view.flatten().tolist() for view in hf_views(pair, fused[4:], architecture)] == [[2, 3], [11], [21]]


def test_a_fused_qkv_view_writes_through_with_wide_heads() -> None:
    architecture = _architecture()
    pair = _pair("decoder.layers.0.self_attention.linear_qkv.weight", architecture)
    fused = torch.zeros(8, 3)
    _, key, _ = hf_views(pair, fused, architecture)
    key.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(key.shape))
    assert fused[2].tolist() == [1, 2, 3]
    assert fused[6].tolist() == [4, 5, 6]
    assert fused.sum() == 21


def test_gated_mlp_holds_all_gate_rows_then_all_up_rows() -> None:
    architecture = _architecture()
    pair = _pair("decoder.layers.0.mlp.linear_fc1.weight", architecture)
    gate, up = hf_views(pair, torch.arange(10).unsqueeze(1), architecture)
    assert pair.rule is Rule.GATED_MLP
    assert list(pair.hf_shapes) == ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert gate.flatten().tolist() == [0, 1, 2, 3, 4]
    assert up.flatten().tolist() == [5, 6, 7, 8, 9]


def test_shapes_follow_the_architecture() -> None:
    shapes = hf_shapes(_architecture(qkv_bias=True, qk_norm=True))
    layer = {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if ".layers.1." in name}
    assert layer == {
        "self_attn.q_proj.weight": (4, 3),
        "self_attn.k_proj.weight": (2, 3),
        "self_attn.v_proj.weight": (2, 3),
        "self_attn.q_proj.bias": (4,),
        "self_attn.k_proj.bias": (2,),
        "self_attn.v_proj.bias": (2,),
        "self_attn.o_proj.weight": (3, 4),
        "self_attn.q_norm.weight": (1,),
        "self_attn.k_norm.weight": (1,),
        "mlp.gate_proj.weight": (5, 3),
        "mlp.up_proj.weight": (5, 3),
        "mlp.down_proj.weight": (3, 5),
        "input_layernorm.weight": (3,),
        "post_attention_layernorm.weight": (3,),
    }
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (7, 3)
    assert len(shapes) == 2 * len(layer) + 3
    assert "lm_head.weight" not in hf_shapes(_architecture(tied_embeddings=True))


def test_only_the_two_layer_norms_have_a_second_name_under_transformer_engine() -> None:
    second = {pair.name: pair.megatron_names[1] for pair in weight_pairs(_architecture()) if pair.megatron_names[1:]}
    expected = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    assert second == {f"decoder.layers.{i}.{a}": f"decoder.layers.{i}.{b}" for i in (0, 1) for a, b in expected.items()}


def test_row_parallel_tensors_are_split_along_their_inputs() -> None:
    by_row = {pair.name.split(".", 3)[3] for pair in weight_pairs(_architecture()) if pair.split is Split.ROW}
    assert by_row == {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}
