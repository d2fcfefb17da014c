"""What a Hugging Face folder's model is: the facts of `config.json` that the Megatron model is built from.

Plain JSON in, one frozen record out; importable without torch. Whatever this project cannot reproduce exactly
is refused here, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlt.config.hf_config import HfConfig, shown, stop_ids
from megatron_rlt.config.rope import read_rope

_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Architecture:
    """Shape and conventions of one dense decoder."""

    family: str  # "llama", "qwen2" or "qwen3"
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_epsilon: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # with key "rope_type"; None: plain RoPE
    max_positions: int

    @classmethod
    def from_folder(cls, folder: Path) -> Architecture:
        """Read `config.json` of a Hugging Face folder.

        Raises:
            ValueError: no readable config.json, a key is missing, or the model is of a kind not supported here.
        """
        values = HfConfig.from_folder(folder)
        family = _family(values)
        _refuse_variants(values, family)
        num_heads, hidden_size = values.integer("num_attention_heads"), values.integer("hidden_size")
        num_kv_heads, max_positions = values.integer("num_key_value_heads"), values.integer("max_position_embeddings")
        if num_heads % num_kv_heads != 0:
            values.fail(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}",
            )
        rope_theta, rope_scaling = read_rope(values, max_positions)
        vocab_size = values.integer("vocab_size")
        if above := sorted(one for one in stop_ids(values.source, values.keys) if one >= vocab_size):
            values.fail(f"eos_token_id {above[0]} must be below vocab_size {vocab_size}")
        return cls(
            family=family,
            num_layers=values.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_size=values.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(values, family, hidden_size, num_heads),
            vocab_size=vocab_size,
            tied_embeddings=values.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            norm_epsilon=values.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=max_positions,
        )


def _family(values: HfConfig) -> str:
    names = values.keys.get("architectures") or []
    if not isinstance(names, list):
        values.fail(f"architectures must be a list of names, got {names!r}")
    known = [_FAMILIES[name] for name in names if isinstance(name, str) and name in _FAMILIES]
    if len(known) != 1:
        values.fail(f"unsupported architectures {names}", f"supported are {', '.join(_FAMILIES)}")
    if values.keys.get("model_type", known[0]) != known[0]:
        values.fail(
            f"architectures {names} and model_type {values.keys['model_type']!r} name two kinds of model",
            "correct the one that is wrong; transformers would take model_type",
        )
    return known[0]


def _refuse_variants(values: HfConfig, family: str) -> None:
    """Refuse what would load but compute something else."""
    biases = ("attention_bias", "mlp_bias") if family == "llama" else ("attention_bias",)
    for key in biases if family != "qwen2" else ():
        if values.flag(key):
            values.fail(f"{key}=true is not supported for {family}", "use a model without these biases")
    if values.keys.get("hidden_act", "silu") != "silu":
        values.fail(f"hidden_act must be 'silu', got {values.keys['hidden_act']!r}", "use a SwiGLU model")
    if values.has("quantization_config"):
        values.fail("quantized weights cannot be loaded", "use the bfloat16 or float32 version of the model")
    if values.has("transformers_weights"):
        values.fail(
            f"transformers_weights={values.keys['transformers_weights']!r} names a file of weights of its own",
            "rename the file to model.safetensors and remove the key",
        )
    if family != "llama" and _slides(values):
        values.fail("sliding-window attention is not supported", "use a model with use_sliding_window=false")


def _slides(values: HfConfig) -> bool:
    """Whether any layer looks at a window only; a window that no layer uses is harmless."""
    full = values.keys.get("max_window_layers", 0)
    if full is not None and (not isinstance(full, int) or isinstance(full, bool)):
        values.fail(f"max_window_layers must be an integer, got {shown(full)}")
    uses_window = values.flag("use_sliding_window")
    if values.has("layer_types"):
        layer_types = values.keys["layer_types"]
        if not isinstance(layer_types, list):
            values.fail(f"layer_types must be a list of names, got {layer_types!r}")
        return any(layer_type != "full_attention" for layer_type in layer_types)
    if not uses_window or not values.has("sliding_window"):
        return False
    return values.integer("num_hidden_layers") > (full or 0)


def _head_dim(values: HfConfig, family: str, hidden_size: int, num_heads: int) -> int:
    if values.has("head_dim") or family == "qwen3":
        head_dim = values.integer("head_dim")
    elif hidden_size % num_heads != 0:
        values.fail(
            f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads}",
            "state head_dim in config.json",
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2 != 0:
        values.fail(f"head_dim must be even for RoPE, got {head_dim}")
    return head_dim


def position_limit(shape: Architecture) -> int:
    """Longest sequence in tokens that the model's position encoding was made for.

    `max_position_embeddings` of a yarn or linearly scaled model is the length before scaling in many published
    folders; llama3's already counts the scaling in.
    """
    scaling = shape.rope_scaling
    if scaling is None or scaling["rope_type"] == "llama3":
        return shape.max_positions
    original = shape.max_positions
    if scaling["rope_type"] == "yarn":
        original = scaling["original_max_position_embeddings"]
    return max(shape.max_positions, int(scaling["factor"] * original))
