"""A tokenizer that does not give text back is refused at start, by folder and with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import pair_builder, student_format, teacher_format
from megatron_rlt.prompts.tokenizer import load_tokenizer
from megatron_rlt.prompts.tokenizer_checks import PROBES, vocabulary_probes
from megatron_rlt.types import Problem
from tests.tiny_tokenizers import NEWLINES_APART, Style, tiny_tokenizer

PLAIN = PromptConfig(teacher_system="", student_system="")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def save(folder: Path, core: Tokenizer) -> Path:
    core.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, eos_token="</s>").save_pretrained(folder)
    return folder


def characters() -> models.Model:
    """A vocabulary of single characters and, for all others, bytes, as SentencePiece's with byte fallback."""
    signs = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?+_|<>\n\u2581"
    vocabulary = {name: i for i, name in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *signs])}
    return models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)


def sentencepiece_like(folder: Path, kind: str) -> Path:
    core = Tokenizer(characters())
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "prepended":  # as Llama 2's file has it
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=kind, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if kind != "never" else []
    core.decoder = decoders.Sequence([*parts, *strip])
    return save(folder, core)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "first",
            "' a space first and two last  ' into 'a space first and two last  ': its ids must give the text back",
        ),
        (
            "always",
            "' a space first and two last  ' into 'a space first and two last  ': its ids must give the text back",
        ),
        ("prepended", "encoded one after the other, into .*: prompt and completion would not join"),
    ],
)
def test_a_space_before_every_encoded_piece_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    """Where one text comes back, two that stand one after the other do not."""
    folder = sentencepiece_like(tmp_path / "tokenizer", kind)
    with pytest.raises(ValueError, match=f"{said}; take a model with a byte-level tokenizer") as refusal:
        pair_builder(folder, folder, PLAIN)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_pieces_that_join_are_accepted_whatever_the_kind_of_tokenizer(tmp_path: Path) -> None:
    folder = sentencepiece_like(tmp_path / "tokenizer", "never")
    pairs = pair_builder(folder, folder, PLAIN)
    pair = pairs.pair_from_text(Problem("p", "2 + 2?", "It is 4."), "Two and two.")
    read = pairs.student.tokenizer.decode(pair.student.token_ids.tolist())
    thought = "<|begin_of_thought|>\n\nTwo and two.\n\n<|end_of_thought|>"
    assert read.endswith(f"{thought}\n\n<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|></s>")


def whole_words() -> Tokenizer:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def byte_level(normalizer: normalizers.Normalizer) -> Tokenizer:
    vocabulary = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def test_text_that_comes_back_changed_is_refused(tmp_path: Path) -> None:
    """Unknown words, white space, case and letters that look alike."""
    lossy = {
        "words": whole_words(),
        "strip": byte_level(normalizers.Strip()),
        "one-space": byte_level(normalizers.Replace(Regex(" +"), " ")),
        "lines": byte_level(normalizers.Replace("\r\n", "\n")),
        "case": byte_level(normalizers.Lowercase()),
        "accents": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "width": byte_level(normalizers.NFKC()),
    }
    for name, core in lossy.items():
        folder = save(tmp_path / name, core)
        for make in (teacher_format, student_format):
            with pytest.raises(
                ValueError, match=f"tokenizer of .*{name} turns .*must give the text back; take a"
            ) as said:
                make(folder, PLAIN)
            assert "\n" not in str(said.value)
    assert student_format(save(tmp_path / "exact", byte_level(normalizers.NFC())), PLAIN)


def name_class(folder: Path, tokenizer_class: str | None, model_type: str) -> None:
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def cut_otherwise(folder: Path) -> Path:
    """The tokens that join signs and newlines remain in the vocabulary, and no text is cut into them."""
    file = tiny_tokenizer(folder) / "tokenizer.json"
    apart = Tokenizer.from_file(str(tiny_tokenizer(folder / "apart", word=NEWLINES_APART) / "tokenizer.json"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "pre_tokenizer": json.loads(apart.to_str())["pre_tokenizer"]}))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_class_with_a_pre_tokenizer_of_its_own_is_refused_and_the_remedy_works(
    tmp_path: Path, model_type: str
) -> None:
    """DeepSeek's folders name a Llama class; for a Qwen2 model transformers takes its own whatever the folder names."""
    folder = cut_otherwise(tmp_path)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for named in ("LlamaTokenizerFast", "Qwen2Tokenizer"):
        name_class(folder, named, model_type)
        remedy = r'"tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config\.json$'
        with pytest.raises(ValueError, match=rf"other ids than tokenizer\.json says .*; name {remedy}") as said:
            teacher_format(folder, PLAIN)
        assert str(folder) in str(said.value)
        assert "\n" not in str(said.value)
    name_class(folder, "PreTrainedTokenizerFast", model_type)
    tokenizer = teacher_format(folder, PLAIN).tokenizer
    for text in (*PROBES, *vocabulary_probes(tokenizer)):
        assert tokenizer.encode(text) == own.encode(text).ids


def test_one_vocabulary_that_cuts_text_in_two_ways_is_refused(folders: dict[Style, Path], tmp_path: Path) -> None:
    """The rule of the configuration compares vocabularies only."""
    other = cut_otherwise(tmp_path)
    for teacher, student in ((folders["qwen"], other), (other, folders["qwen"])):
        with pytest.raises(ValueError, match=r"have one vocabulary but cut .* differently") as said:
            pair_builder(teacher, student, PLAIN)
        assert str(teacher) in str(said.value)
        assert str(student) in str(said.value)
        assert "\n" not in str(said.value)


def test_probes_of_the_vocabulary_find_a_single_merge_that_is_used_otherwise(
    folders: dict[Style, Path], tmp_path: Path
) -> None:
    """Texts of a fixed list would not hold it: here a pre-tokenizer that cuts before every `q` or `Q`."""
    other = tmp_path / "other"
    shutil.copytree(folders["qwen"], other)
    content = json.loads((other / "tokenizer.json").read_text())
    cut = {"type": "Split", "pattern": {"Regex": "[qQ]"}, "behavior": "MergedWithNext", "invert": False}
    content["pre_tokenizer"]["pretokenizers"].insert(1, cut)
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert not any("q" in text.lower() for text in PROBES)
    with pytest.raises(ValueError, match=r"have one vocabulary but cut .* differently"):
        pair_builder(folders["qwen"], other, PLAIN)


def test_turn_markers_that_are_ordinary_tokens_become_special(tmp_path: Path) -> None:
    """Those that the template writes, and no other added token."""
    core = byte_level(normalizers.NFC())
    core.add_tokens([AddedToken("<User>", special=False), AddedToken("<Bot>", special=False), AddedToken("<think>")])
    folder = save(tmp_path, core)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<User>' if m['role'] == 'user' else '<Bot>' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<Bot>' }}{% endif %}"
    )
    student = student_format(folder, PromptConfig(tags="r1", student_system=""))
    user, bot, think = (student.tokenizer.hf.convert_tokens_to_ids(token) for token in ("<User>", "<Bot>", "<think>"))
    for question in ("2 + 2?<Bot>4<User>Or", "<User>", "a<Bot>"):
        with pytest.raises(ValueError, match=r"problem p: its question holds the special token '<(User|Bot)>'"):
            student.solving_prompt("p", question, prefill_thought=True)
    sequence = student.sft_sequence(Problem("p", "2 + 2?", "<User>4<Bot>", "It is<User>"), whole_turn=True).token_ids
    assert sequence.tolist().count(user) == sequence.tolist().count(bot) == 1
    assert sequence.tolist().count(think) == 1, "a tag may well be a token of its own"
    assert student.tokenizer.decode(sequence.tolist()).count("<User>") == 3


def test_a_tokenizer_can_be_loaded_alone(folders: dict[Style, Path]) -> None:
    """As tools do that only decode."""
    tokenizer = load_tokenizer(folders["llama"])
    assert tokenizer.decode(tokenizer.encode(" a\n\n b")) == " a\n\n b"
