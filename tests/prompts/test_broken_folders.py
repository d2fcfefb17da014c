"""A tokenizer or chat template that cannot be used is one ValueError that names its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import student_format, teacher_format
from megatron_rlt.prompts.tokenizer import load_tokenizer
from tests.tiny_models import tiny_hf_model
from tests.tiny_tokenizers import tiny_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_of_the_tokenizer_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / name).write_bytes(content)
    if content.startswith(b'{"') and name != "tokenizer.json":
        return  # an object without the keys that are looked for
    with pytest.raises(ValueError, match=str(folder)) as error:
        load_tokenizer(folder)
    assert "; " in str(error.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "is no valid template (line 1"),
        ("{{ messages[0].content", "is no valid template"),
        ("{% for message in messages %}", "is no valid template"),
        ("{{ messages[0].content + 1 }}", "fails (TypeError"),
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
        ("{{ messages[0].no_such.key }}", "fails (UndefinedError: "),
        ("{{ bos_token + messages[0].content }}", "fails (UndefinedError: 'bos_token' is undefined); correct or"),
        ("{{ messages | no_such_filter }}", "No filter named"),
        ("{{ raise_exception('not today') }}", "refuses the messages: not today"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_named(template: str, says: str, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"chat template of {folder}") as error:
        load_tokenizer(folder).chat_prefix("", "2+2?")
    assert says in str(error.value)


def test_a_template_that_does_not_end_is_refused_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it would end, after about a second; with one loop more it takes hours."""
    folder = tiny_tokenizer(tmp_path)
    loops = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    monkeypatch.setattr("megatron_rlt.prompts.tokenizer._TEMPLATE_SECONDS", 0.05)
    with pytest.raises(ValueError, match=f"chat template of {folder} takes more than 0.05 seconds for one question"):
        load_tokenizer(folder)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=f"tokenizer of {folder} cannot be loaded"):
        load_tokenizer(folder)


def test_an_embedding_without_a_row_for_an_id_is_refused_by_every_format(tmp_path: Path) -> None:
    folder = tiny_hf_model(tiny_tokenizer(tmp_path), "qwen2", tied=True, vocab_size=395, num_layers=1)
    num_ids = load_tokenizer(folder).num_ids
    config = json.loads((folder / "config.json").read_text())
    for vocab_size in (num_ids, num_ids + 100):
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
        assert teacher_format(folder, PromptConfig())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": num_ids - 1}))
    for formats in (teacher_format, student_format):
        with pytest.raises(
            ValueError, match=f"vocabulary of {num_ids - 1} and cannot read the tokenizer's {num_ids} ids"
        ):
            formats(folder, PromptConfig())
