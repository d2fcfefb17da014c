"""What a Hugging Face folder's model is: the facts of `config.json` that the Megatron model is built from.

Plain JSON in, one frozen record out; importable without torch. Whatever this project cannot reproduce exactly
is refused here, before any weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys each scaling needs; `original_max_position_embeddings` may be left out, transformers then takes max_positions.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

# Keys that a config.json may leave out, with the value that transformers' Llama, Qwen2 and Qwen3 classes then take.
_OPTIONAL = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "head_dim": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 0,
    "layer_types": None,
    "quantization_config": None,
    "rope_parameters": None,
    "rope_scaling": None,
}


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
        source = folder / "config.json"
        values = _Values(source, _read_json(source))
        family = _family(values)
        _refuse_variants(values, family)
        num_heads, hidden_size = values.integer("num_attention_heads"), values.integer("hidden_size")
        num_kv_heads, max_positions = values.integer("num_key_value_heads"), values.integer("max_position_embeddings")
        if num_heads % num_kv_heads != 0:
            values.fail(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and {num_kv_heads}",
                "correct config.json",
            )
        rope_theta, rope_scaling = _rope(values, max_positions)
        return cls(
            family=family,
            num_layers=values.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_size=values.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(values, family, hidden_size, num_heads),
            vocab_size=values.integer("vocab_size"),
            tied_embeddings=bool(values.optional("tie_word_embeddings")),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            norm_epsilon=values.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=max_positions,
        )


@dataclass(frozen=True)
class _Values:
    """The keys of one config.json; every complaint names the file."""

    source: Path
    keys: dict[str, Any]

    def fail(self, what: str, remedy: str) -> None:
        raise ValueError(f"{self.source}: {what}; {remedy}")

    def optional(self, key: str) -> Any:  # noqa: ANN401 - any JSON value
        return self.keys.get(key, _OPTIONAL[key])

    def integer(self, key: str) -> int:
        value = self._required(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.fail(f"{key} must be a positive integer, got {value!r}", "correct config.json")
        return int(value)

    def number(self, key: str) -> float:
        value = self._required(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            self.fail(f"{key} must be a positive number, got {value!r}", "correct config.json")
        return float(value)

    def _required(self, key: str) -> Any:  # noqa: ANN401 - any JSON value
        if key not in self.keys:
            self.fail(f"key {key!r} is missing", "use a complete Hugging Face folder")
        return self.keys[key]


def _read_json(source: Path) -> dict[str, Any]:
    if not source.is_file():
        raise ValueError(f"{source}: no such file; the model must be a Hugging Face folder with a config.json")
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not valid JSON ({error}); download the folder again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: must hold one JSON object; download the folder again")
    return values


def _family(values: _Values) -> str:
    names = values.keys.get("architectures") or []
    known = [_FAMILIES[name] for name in names if name in _FAMILIES]
    if len(known) != 1:
        values.fail(f"unsupported architectures {names}", f"supported are {', '.join(_FAMILIES)}")
    return known[0]


def _refuse_variants(values: _Values, family: str) -> None:
    """Refuse what would load but compute something else."""
    biases = ("attention_bias", "mlp_bias") if family == "llama" else ("attention_bias",)
    for key in biases if family != "qwen2" else ():
        if values.optional(key):
            values.fail(f"{key}=true is not supported for {family}", "use a model without these biases")
    if values.optional("hidden_act") != "silu":
        values.fail(f"hidden_act must be 'silu', got {values.optional('hidden_act')!r}", "use a SwiGLU model")
    if values.optional("quantization_config") is not None:
        values.fail("quantized weights cannot be loaded", "use the bfloat16 or float32 version of the model")
    if family != "llama" and _slides(values):
        values.fail("sliding-window attention is not supported", "use a model with use_sliding_window=false")


def _slides(values: _Values) -> bool:
    """Whether any layer looks at a window only; a window that no layer uses is harmless."""
    layer_types = values.optional("layer_types")
    if layer_types is not None:
        return any(layer_type != "full_attention" for layer_type in layer_types)
    used = values.optional("use_sliding_window") and values.optional("sliding_window") is not None
    return bool(used) and values.integer("num_hidden_layers") > values.optional("max_window_layers")


def _head_dim(values: _Values, family: str, hidden_size: int, num_heads: int) -> int:
    if values.optional("head_dim") is not None or family == "qwen3":
        return values.integer("head_dim")
    if hidden_size % num_heads != 0:
        values.fail(
            f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads}",
            "state head_dim in config.json",
        )
    return hidden_size // num_heads


def _rope(values: _Values, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of RoPE, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    parameters = dict(values.optional("rope_parameters") or values.optional("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = values.number("rope_theta")
    legacy_type = parameters.pop("type", "default")
    rope_type = parameters.pop("rope_type", legacy_type)
    if rope_type not in _ROPE_TYPES:
        values.fail(f"RoPE type {rope_type!r} is not supported", f"supported are {', '.join(_ROPE_TYPES)}")
    for key in _ROPE_KEYS[rope_type]:
        if not isinstance(parameters.get(key), int | float):
            values.fail(f"RoPE type {rope_type!r} needs the number {key!r}", "correct the RoPE scaling in config.json")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        values.fail("partial_rotary_factor must be 1", "use a model that rotates whole heads")
    if rope_type == "default":
        return float(theta), None
    if rope_type in ("llama3", "yarn"):
        parameters.setdefault("original_max_position_embeddings", max_positions)
    return float(theta), {"rope_type": rope_type, **parameters}


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
