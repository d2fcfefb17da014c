"""Reading config.json: what is understood, and the one line for what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.architecture import Architecture
from tests.tiny_models import tiny_hf_model

_LLAMA: dict[str, Any] = {  # Llama 3.1 8B's own config.json, as its authors wrote it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
_QWEN2 = {  # the fields of Qwen2.5 7B that matter here: a window is stated but not used
    **{key: value for key, value in _LLAMA.items() if key not in ("rope_scaling", "attention_bias", "mlp_bias")},
    "architectures": ["Qwen2ForCausalLM"],
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
_QWEN3 = {**_QWEN2, "architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "attention_bias": False}


def _read(folder: Path, values: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(values))
    return Architecture.from_folder(folder)


def test_a_published_llama_is_read_in_full(tmp_path: Path) -> None:
    assert _read(tmp_path, _LLAMA) == Architecture(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        norm_epsilon=1e-05,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        max_positions=131072,
    )


def test_families_differ_in_bias_norm_and_head_size(tmp_path: Path) -> None:
    qwen2, qwen3 = _read(tmp_path, _QWEN2), _read(tmp_path, _QWEN3)
    assert (qwen2.family, qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == ("qwen2", True, False, 128)
    assert (qwen3.family, qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == ("qwen3", False, True, 64)
    assert qwen2.rope_scaling is None


def test_both_spellings_of_rope_mean_the_same(tmp_path: Path) -> None:
    new = {key: value for key, value in _LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**_LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert _read(tmp_path, new) == _read(tmp_path, _LLAMA)
    old = {**_QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert _read(tmp_path, old).rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 131072,
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_transformers_saves_is_read_back(family: str, tmp_path: Path) -> None:
    plain = Architecture.from_folder(tiny_hf_model(tmp_path / "plain", family, tied=False))
    scaling = {"rope_type": "linear", "factor": 2.0}
    scaled = Architecture.from_folder(tiny_hf_model(tmp_path / "scaled", family, tied=True, rope_scaling=scaling))
    assert (plain.family, plain.num_layers, plain.vocab_size, plain.max_positions) == (family, 4, 131, 512)
    assert scaled == replace(plain, tied_embeddings=True, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**_LLAMA, "architectures": ["MixtralForCausalLM"]}, "unsupported architectures ['MixtralForCausalLM']"),
        ({key: value for key, value in _LLAMA.items() if key != "architectures"}, "unsupported architectures []"),
        ({key: value for key, value in _LLAMA.items() if key != "vocab_size"}, "key 'vocab_size' is missing"),
        ({key: value for key, value in _LLAMA.items() if key != "rope_theta"}, "key 'rope_theta' is missing"),
        ({key: value for key, value in _QWEN3.items() if key != "head_dim"}, "key 'head_dim' is missing"),
        ({**_LLAMA, "num_hidden_layers": "32"}, "num_hidden_layers must be a positive integer, got '32'"),
        ({**_LLAMA, "rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ({**_LLAMA, "num_key_value_heads": 5}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({**_LLAMA, "hidden_size": 4100}, "hidden_size must be a multiple of num_attention_heads"),
        ({**_LLAMA, "attention_bias": True}, "attention_bias=true is not supported for llama"),
        ({**_LLAMA, "mlp_bias": True}, "mlp_bias=true is not supported for llama"),
        ({**_QWEN3, "attention_bias": True}, "attention_bias=true is not supported for qwen3"),
        ({**_LLAMA, "hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({**_LLAMA, "quantization_config": {"quant_method": "awq"}}, "quantized weights cannot be loaded"),
        ({**_QWEN2, "use_sliding_window": True}, "sliding-window attention is not supported"),
        ({**_QWEN3, "layer_types": ["sliding_attention"] * 32}, "sliding-window attention is not supported"),
        ({**_LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic' is not supported"),
        ({**_LLAMA, "rope_scaling": {"rope_type": "yarn"}}, "RoPE type 'yarn' needs the number 'factor'"),
        (
            {**_LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1",
        ),
    ],
)
def test_what_cannot_be_reproduced_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        _read(tmp_path, values)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: {message}")
    assert "; " in text, "an error names a remedy"


def test_a_stated_window_that_no_layer_uses_is_harmless(tmp_path: Path) -> None:
    assert _read(tmp_path, {**_QWEN2, "use_sliding_window": True, "max_window_layers": 32}).family == "qwen2"


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; the model must be a Hugging Face folder"):
        Architecture.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Architecture.from_folder(tmp_path)


def test_reading_an_architecture_needs_no_torch() -> None:
    code = "import sys, megatron_rlt.config.architecture; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
