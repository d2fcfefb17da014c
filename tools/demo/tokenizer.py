"""The demo's tokenizer: one id a word, one id an operation, a chat template of two tokens; an ordinary folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.demo.chain_arithmetic import FILLERS, MODULUS, OPENERS, OPERATIONS

TAGS = ("<exp>", "</exp>", "<sol>")
SPECIAL_TOKENS = ("<pad>", "<eos>", "<q>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<q> ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '<eos>' }}"
    "{% else %}{{ raise_exception('this template has no system message') }}{% endif %}"
    "{% endfor %}"
)


def vocabulary() -> list[str]:
    """Every word the task can write, in the order of its ids; special tokens come after."""
    texts = " ".join((*OPENERS, "so we get .", *FILLERS)).split()
    digits = [str(digit) for digit in range(MODULUS)]
    return list(dict.fromkeys(["<unk>", *TAGS, *digits, *OPERATIONS, "=", ";", *texts]))


def save_tokenizer(folder: Path, further_words: Sequence[str] = ()) -> int:
    """Write the tokenizer into `folder` and return how many ids it has; `further_words` come before special tokens."""
    words = [*vocabulary(), *further_words]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    # Tags are words of their own even where no space surrounds them.
    tags = pre_tokenizers.Split(Regex("</?[a-z]+>"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([tags, pre_tokenizers.WhitespaceSplit()])
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=CHAT_TEMPLATE, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
