"""A model folder is weights, vocabulary and settings: no code of it is run, and nobody is asked whether to."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlt.cli import main
from megatron_rlt.models.dense import dense_logprobs
from megatron_rlt.models.weights.hf_reader import read_headers
from megatron_rlt.prompts.tokenizer import load_tokenizer
from megatron_rlt.types import Span, SpannedSequence, tell_nobody
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.trust.payload import Payload


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "marker")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_hf_model(tmp_path / "model", "qwen2", tied=False, num_layers=1, vocab_size=401)
    shutil.copytree(tiny_tokenizer(tmp_path / "tokenizer"), folder, dirs_exist_ok=True)
    return folder


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _bring_code(model: Path, payload: Payload) -> None:
    """What made transformers ask on the terminal, where `y` ran it."""
    (model / "code.py").write_text(f"{payload.python}\nclass Made:\n    pass\n")
    _change(
        model / "config.json",
        auto_map={"AutoConfig": "code.Made", "AutoModelForCausalLM": "code.Made", "AutoTokenizer": "code.Made"},
    )
    _change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["code.Made", None]},
        tokenizer_class="MadeTokenizer",
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_folder_that_names_code_is_refused_in_one_line_before_anything_loads(
    tmp_path: Path, model: Path, payload: Payload, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "code.py").write_text(payload.python)
    (model / file).touch()
    (model / file).write_text(
        json.dumps(json.loads((model / file).read_text() or "{}") | {"auto_map": {"A": "code.B"}})
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model: {{model: {model}}}\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\noutput_dir: {tmp_path / 'run'}\n"
        "max_tokens: 64\n"
    )
    assert main(["sft", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"model.model: {model / file} names code of its own (auto_map)" in line
    assert not payload.has_run
    assert not (tmp_path / "run").exists()


def test_transformers_neither_runs_code_nor_asks(
    model: Path, payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the check of the configuration: who answers `y` has nothing to answer."""
    _bring_code(model, payload)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    sequence = SpannedSequence(torch.tensor([1, 2, 3]), (Span(1, 3),))
    for opener in (
        lambda: load_tokenizer(model),
        lambda: dense_logprobs(model, (sequence,), temperature=1.0, on_progress=tell_nobody),
    ):
        with suppress(ValueError):  # it falls back to its own class, or refuses
            opener()
    assert asked == []
    assert not payload.has_run


def test_pickled_weights_are_not_read(model: Path, payload: Payload) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "pytorch_model.bin").write_bytes(payload.pickled)
    sequence = SpannedSequence(torch.tensor([1, 2, 3]), (Span(1, 3),))
    with pytest.raises(OSError, match="safetensors"):
        dense_logprobs(model, (sequence,), temperature=1.0, on_progress=tell_nobody)
    assert not payload.has_run


@pytest.mark.parametrize("form", ["pickled", "saved_by_torch"])
def test_pickled_weights_under_the_name_of_safetensors_are_not_read(model: Path, payload: Payload, form: str) -> None:
    (model / "model.safetensors").write_bytes(getattr(payload, form))
    with pytest.raises(Exception, match="safetensors"):
        read_headers(model)
    assert not payload.has_run


def test_a_chat_template_reaches_nothing(model: Path, payload: Payload) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}" + payload.template)
    with pytest.raises(ValueError, match="chat template of"):
        load_tokenizer(model)
    assert not payload.has_run


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pickle_in_the_place_of_a_tokenizer_is_not_run(model: Path, payload: Payload, name: str) -> None:
    (model / name).write_bytes(payload.pickled)
    with pytest.raises(Exception):  # noqa: B017, PT011 - each file has its own check
        load_tokenizer(model)
    assert not payload.has_run
