"""A working folder in which the configurations of `valid.py` hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.model_folders import model_folder
from tests.config.valid import VALID


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory with models, rows and one valid configuration file a command."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "teacher")
    model_folder(tmp_path / "student", num_attention_heads=6, num_key_value_heads=6, hidden_size=96)
    model_folder(tmp_path / "other_tokens", vocabulary={"a": 0, "b": 2, "c": 1})
    model_folder(tmp_path / "no_weights", without=("model.safetensors",))
    model_folder(tmp_path / "no_tokenizer", without=("tokenizer.json",))
    model_folder(tmp_path / "gpt2", architectures=["GPT2LMHeadModel"])
    model_folder(tmp_path / "no_config", without=("config.json",))
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "1+1?", "solution": "2"}\n\n{"question": "2+2?", "solution": "4"}\n'
    )
    (tmp_path / "questions.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n' * 3)
    (tmp_path / "rows.csv").write_text("question,solution\n")
    (tmp_path / "empty_folder").mkdir()
    for command, text in VALID.items():
        (tmp_path / f"{command}.yaml").write_text(text)
    return tmp_path
