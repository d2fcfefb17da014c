"""Architecture from what Megatron's tools write beside weights: arguments, NeMo's model.yaml, Bridge's run_config.yaml.

All three describe one Megatron model; `_PROVIDER` are the names of NeMo and Bridge, and Megatron-LM's arguments are
renamed to them. Whatever this project cannot reproduce exactly is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rlt.config.architecture import Architecture

# Megatron-LM's argument -> the name in NeMo's and Bridge's configurations.
_FROM_ARGUMENTS = {
    "norm_epsilon": "layernorm_epsilon",
    "swiglu": "gated_linear_unit",
    "num_experts": "num_moe_experts",
    "use_rope_scaling": "rope_scaling",
    "max_position_embeddings": "seq_length",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
# What a dense Llama, Qwen2 or Qwen3 has; another value is another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "num_moe_experts": (None,),
    "multi_latent_attention": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "window_size": (None,),
    "mtp_num_layers": (None, 0),
}
_OTHER_SCALING = "hf_rope_scaling"  # our own argument: Megatron-LM has no words for it, and ignores it
MEGATRON_LLAMA3 = {  # what Megatron's flag for RoPE scaling stands for, besides the factor
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA31 = {  # NeMo's and Bridge's names for the same numbers, where they are free
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


def architecture_from_arguments(arguments: Mapping[str, Any], source: Path) -> Architecture:
    """Architecture from Megatron-LM's arguments."""
    values = {_FROM_ARGUMENTS.get(name, name): value for name, value in arguments.items()}
    values["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights", False)
    if not arguments.get("group_query_attention", True):
        values["num_query_groups"] = None
    architecture = architecture_from_provider(values, source)
    other = arguments.get(_OTHER_SCALING)
    return architecture if not isinstance(other, dict) else replace(architecture, rope_scaling=other)


def architecture_from_provider(values: Mapping[str, Any], source: Path) -> Architecture:
    """Architecture from the fields of NeMo's or Bridge's model configuration.

    `vocab_size` is 0 where the configuration leaves it to the tokenizer: the stored rows then tell.

    Raises:
        ValueError: a field is missing or no number, or the model is of a kind not supported here.
    """
    for name, accepted in _FIXED.items():
        if name in values and _plain(values[name]) not in accepted:
            raise ValueError(f"{source}: {name}={_plain(values[name])!r} is not that of a dense Llama, Qwen2 or Qwen3")
    qkv_bias, qk_norm = bool(values.get("add_qkv_bias")), bool(values.get("qk_layernorm"))
    if qkv_bias and qk_norm:
        raise ValueError(f"{source}: add_qkv_bias with qk_layernorm is neither Qwen2 nor Qwen3, and is not supported")
    num_heads, hidden_size = _integer(values, "num_attention_heads", source), _integer(values, "hidden_size", source)
    return Architecture(
        family="qwen2" if qkv_bias else "qwen3" if qk_norm else "llama",
        num_layers=_integer(values, "num_layers", source),
        hidden_size=hidden_size,
        ffn_size=_integer(values, "ffn_hidden_size", source),
        num_heads=num_heads,
        num_kv_heads=_integer(values, "num_query_groups", source, num_heads),
        head_dim=_integer(values, "kv_channels", source, hidden_size // num_heads),
        vocab_size=_integer(values, "vocab_size", source, 0),
        tied_embeddings=bool(values.get("share_embeddings_and_output_weights", True)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_epsilon=_number(values, "layernorm_epsilon", source),
        rope_theta=_number(values, "rotary_base", source),
        rope_scaling=_rope_scaling(values, source),
        max_positions=_integer(values, "seq_length", source),
    )


def export_fault(architecture: Architecture, kind: str) -> str | None:
    """Why a kind of folder cannot express an architecture; None where it can."""
    try:
        if kind != "hf":
            (arguments_of if kind == "megatron" else provider_fields)(architecture, "this model")
        if kind == "bridge":
            megatron_scaling_factor(architecture, "this model")
    except ValueError as fault:
        return str(fault)
    return None


def provider_fields(architecture: Architecture, source: str) -> dict[str, Any]:
    """The same fields from an architecture, without those of Llama 3's RoPE scaling: see `llama31_fields`."""
    if architecture.rope_scaling is not None and architecture.rope_scaling["rope_type"] not in ("linear", "llama3"):
        raise ValueError(
            f"{source}: RoPE scaling {architecture.rope_scaling['rope_type']!r} has no place in Megatron's, NeMo's and"
            " Bridge's configurations; stay with --to hf"
        )
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,
        "layernorm_epsilon": architecture.norm_epsilon,
        "rotary_base": architecture.rope_theta,
        "seq_length": architecture.max_positions,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if architecture.rope_scaling is not None and architecture.rope_scaling["rope_type"] == "linear":
        fields["seq_len_interpolation_factor"] = float(architecture.rope_scaling["factor"])
    return fields


def llama31_fields(architecture: Architecture) -> dict[str, Any] | None:
    """Scaling of Llama 3.1 under NeMo's and Bridge's names; None for a model without it."""
    scaling = architecture.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    return {name: scaling[key] for name, key in _LLAMA31.items()}


def megatron_scaling_factor(architecture: Architecture, source: str) -> float | None:
    """The factor of Megatron's flag for RoPE scaling; None for a model without it.

    Raises:
        ValueError: the other numbers are not those that Megatron has in its code.
    """
    scaling = architecture.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    for key, value in MEGATRON_LLAMA3.items():
        if scaling[key] != value:
            raise ValueError(
                f"{source}: RoPE scaling with {key}={scaling[key]} cannot be told to Megatron, which has {value} in its"
                " code; stay with --to hf or --to nemo"
            )
    return float(scaling["factor"])


def arguments_of(architecture: Architecture, source: str) -> dict[str, Any]:
    """Megatron-LM's arguments for an architecture."""
    plain, other = architecture, {}
    scaling = architecture.rope_scaling
    if scaling is not None and not _megatron_knows(scaling):
        plain, other = replace(architecture, rope_scaling=None), {_OTHER_SCALING: dict(scaling)}
    fields = provider_fields(plain, source)
    names = {new: old for old, new in _FROM_ARGUMENTS.items()}
    tied = fields.pop("share_embeddings_and_output_weights")
    factor = megatron_scaling_factor(plain, source)
    return {
        **{names.get(name, name): value for name, value in fields.items()},
        "seq_length": architecture.max_positions,
        "untie_embeddings_and_output_weights": not tied,
        "group_query_attention": architecture.num_kv_heads != architecture.num_heads,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": 8.0 if factor is None else factor,
        "padded_vocab_size": architecture.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "use_rotary_position_embeddings": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **other,
    }


def _megatron_knows(scaling: Mapping[str, Any]) -> bool:
    """Whether Megatron-LM's own arguments can say a RoPE scaling."""
    if scaling["rope_type"] == "linear":
        return True
    numbers = MEGATRON_LLAMA3.items()
    return scaling["rope_type"] == "llama3" and all(scaling[key] == value for key, value in numbers)


def _rope_scaling(values: Mapping[str, Any], source: Path) -> dict[str, Any] | None:
    linear = values.get("seq_len_interpolation_factor")
    if linear not in (None, 1, 1.0):
        return {"rope_type": "linear", "factor": float(_number(values, "seq_len_interpolation_factor", source))}
    if values.get("rope_scaling"):
        return {"rope_type": "llama3", "factor": _number(values, "rope_scaling_factor", source, 8.0), **MEGATRON_LLAMA3}
    if all(name in values for name in _LLAMA31):
        scaling = {key: _number(values, name, source) for name, key in _LLAMA31.items()}
        original = int(scaling.pop("original_max_position_embeddings"))
        return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}
    return None


def _plain(value: Any) -> Any:  # noqa: ANN401
    """An enumeration's value as text; everything else as it is."""
    arguments = getattr(value, "arguments", None)
    return value if arguments is None else arguments[0] if arguments else None


def _integer(values: Mapping[str, Any], name: str, source: Path, default: int | None = None) -> int:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}; name the model with --config")
    return value


def _number(values: Mapping[str, Any], name: str, source: Path, default: float | None = None) -> float:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{source}: {name} must be a positive number, got {value!r}; name the model with --config")
    return float(value)
