"""Does a tokenizer give a text back? Asked once at start, with texts of many kinds, before a model loads."""

from __future__ import annotations

import random
from itertools import product

from tokenizers import Tokenizer

from megatron_rlt.prompts.tokenizer import ChatTokenizer

PROBES = (
    "What is  12345 + 6.75?\n\n   Let's see:\tf(x_1) = \\frac{1}{2}.\r\n\n\n",
    "It is 4.",
    " a space first and two last  ",
    "\n\nnewlines around.\n\n",
    "中文字符，日本語。한국어 é ü ß",
    "🙂👩‍🚀 x",
    "HTTPServer don't DON'T ... --> </a>",
    "<|begin_of_thought|>\n\nOkay.\n\n<|end_of_thought|>",
)
NUM_VOCABULARY_PROBES, TOKENS_PER_PROBE = 32, 48
_OWN_FILE_REMEDY = 'name "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json'
_WHOLE_WORDS = "prompts.exact_text=false lets a toy vocabulary of whole words pass"


def check_exact_text(tokenizer: ChatTokenizer) -> None:
    """Raise ValueError if ids are not those of the folder's tokenizer.json, or do not give the text back."""
    _check_own_file(tokenizer)
    for text in PROBES:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            raise ValueError(
                f"tokenizer of {tokenizer.folder} turns {text!r} into {back!r}: its ids must give the text back; take a"
                f" model with a byte-level tokenizer ({_WHOLE_WORDS})"
            )
    for first, second in product(PROBES, repeat=2):
        back = tokenizer.decode(tokenizer.encode(first) + tokenizer.encode(second))
        if back != first + second:
            raise ValueError(
                f"tokenizer of {tokenizer.folder} turns {first!r} and {second!r}, encoded one after the other, into"
                f" {back!r}: prompt and completion would not join; take a model with a byte-level tokenizer"
                f" ({_WHOLE_WORDS})"
            )


def check_same_ids(teacher: ChatTokenizer, student: ChatTokenizer) -> None:
    """Raise ValueError if two tokenizers with one vocabulary cut a text differently."""
    for text in (*PROBES, *vocabulary_probes(teacher)):
        ours, theirs = teacher.encode(text), student.encode(text)
        if ours != theirs:
            raise ValueError(
                f"tokenizers of {teacher.folder} and {student.folder} have one vocabulary but cut {_shown(text)}"
                f" differently ({_around_difference(teacher, ours, theirs)}); give the student's folder the teacher's"
                " tokenizer.json and tokenizer_config.json, or take models that were trained with one tokenizer"
            )


def vocabulary_probes(tokenizer: ChatTokenizer) -> list[str]:
    """Texts of random tokens, always the same: where tokenizers cut differently shows only where tokens could merge.

    They need not come back: a normalizer may compose characters that no writer would set side by side.
    """
    draw = random.Random(0)
    added = tokenizer.hf.added_tokens_decoder.keys()
    drawn = (draw.randrange(tokenizer.num_ids) for _ in range(NUM_VOCABULARY_PROBES * TOKENS_PER_PROBE))
    pieces = [tokenizer.decode([token]) for token in drawn if token not in added]
    whole = [piece for piece in pieces if "\ufffd" not in piece]  # not a part of a character
    return ["".join(whole[i : i + TOKENS_PER_PROBE]) for i in range(0, len(whole), TOKENS_PER_PROBE)]


def _check_own_file(tokenizer: ChatTokenizer) -> None:
    file = tokenizer.folder / "tokenizer.json"
    if not file.is_file():
        return
    own = Tokenizer.from_file(str(file))
    own.no_padding()
    own.no_truncation()
    for text in (*PROBES, *vocabulary_probes(tokenizer)):
        read, written = tokenizer.encode(text), own.encode(text, add_special_tokens=False).ids
        if read != written:
            raise ValueError(
                f"tokenizer of {tokenizer.folder}: transformers, as {type(tokenizer.hf).__name__}, encodes"
                f" {_shown(text)} in other ids than tokenizer.json says"
                f" ({_around_difference(tokenizer, read, written)}); {_OWN_FILE_REMEDY}"
            )


def _around_difference(tokenizer: ChatTokenizer, first: list[int], second: list[int]) -> str:
    """The first tokens that differ, as text."""
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    pieces = (tokenizer.hf.convert_ids_to_tokens(ids[shared : shared + 3]) for ids in (first, second))
    return " against ".join(repr(" ".join(map(str, piece))) for piece in pieces)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
