"""Folders that look like a Hugging Face model to everything that runs before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# 4 heads of 16, 2 key-value heads, 4 layers: small divisors, so that nearest valid values are easy to see.
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
VOCABULARY = {"a": 0, "b": 1, "c": 2}


def model_folder(
    folder: Path, *, vocabulary: dict[str, int] = VOCABULARY, without: tuple[str, ...] = (), **changes: Any
) -> Path:
    """Write a folder; `changes` replace keys of `config.json`, `without` names files to leave out."""
    folder.mkdir(parents=True)
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 90, "content": "<end>"}]}
    files = {
        "config.json": json.dumps(QWEN2 | changes),
        "tokenizer.json": json.dumps(tokenizer),
        "model.safetensors": "",
    }
    for name in files.keys() - set(without):
        (folder / name).write_text(files[name])
    return folder
