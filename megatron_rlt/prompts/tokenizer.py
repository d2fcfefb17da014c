"""A model folder's tokenizer with its chat template: text to ids and back, and the end-of-turn token.

Text from data and tags are encoded as plain text: `<|im_end|>` written in a solution must not end the turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.types import Problem

MARK = "turnmark"  # placeholder text, to find what the template writes around a message


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """One model's tokenizer; `hf` is the transformers object, with a chat template and an end-of-sequence token."""

    hf: Any
    folder: Path
    declared_stop_ids: frozenset[int]  # `eos_token_id` of generation_config.json; empty without that file

    def encode(self, text: str) -> list[int]:
        """Encode plain text: no begin-of-text token; strings of special tokens are spelt out as ordinary text."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode to text, special tokens included."""
        text: str = self.hf.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def chat_prefix(self, system: str, question: str) -> list[int]:
        """Ids up to where the assistant begins to write; an empty `system` sends no system message.

        Raises ValueError if the template rejects the messages or renders nothing.
        """
        ids = self._encode_template(self._render(system, question, answer=None))
        if not ids:
            raise ValueError(f"chat template of {self.folder} renders an empty prompt; it must write the question")
        return ids

    def generation_header(self) -> str:
        """Text that the template writes between the user's message and the assistant's."""
        rendered = self._render("", MARK, answer=None)
        return rendered[rendered.rfind(MARK) + len(MARK) :]

    @cached_property
    def end_of_turn_id(self) -> int:
        """Special token that the template writes after an assistant's text, else the end-of-sequence token."""
        rendered = self._render("", "question", answer=MARK)
        suffix = self._encode_template(rendered[rendered.rfind(MARK) + len(MARK) :]) if MARK in rendered else []
        return suffix[0] if suffix and suffix[0] in self.special_tokens else int(self.hf.eos_token_id)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """All ids that end a completion: end of turn, end of sequence, and those that the model folder declares."""
        return self.declared_stop_ids | {self.end_of_turn_id, int(self.hf.eos_token_id)}

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Ids and strings of the special tokens."""
        added: dict[int, Any] = self.hf.added_tokens_decoder
        marked = {token_id: str(token) for token_id, token in added.items() if token.special}
        return marked | dict(zip(self.hf.all_special_ids, self.hf.all_special_tokens, strict=True))

    @cached_property
    def num_ids(self) -> int:
        """Largest token id + 1; the model's vocabulary may have padding rows above it."""
        vocabulary: dict[str, int] = self.hf.get_vocab()
        return max(vocabulary.values()) + 1

    def special_token_in(self, text: str) -> str | None:
        """The first special token whose string occurs in `text`."""
        return next((token for token in self.special_tokens.values() if token in text), None)

    def _encode_template(self, rendered: str) -> list[int]:
        """Encode rendered template text, in which strings of special tokens do mean the tokens."""
        ids: list[int] = self.hf.encode(rendered, add_special_tokens=False, split_special_tokens=False)
        return ids

    def _render(self, system: str, question: str, *, answer: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            rendered = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except TemplateError as error:
            raise ValueError(
                f"chat template of {self.folder} refuses the messages: {error}. If it knows no system role, set the"
                ' system prompt to "" (prompts.teacher_system, prompts.student_system)'
            ) from error
        return str(rendered)


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Read a tokenizer from a local folder. Raises ValueError if it, its chat template or its eos token is missing."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer (no tokenizer_config.json); name a complete Hugging Face folder")
    hf: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not hf.chat_template:
        raise ValueError(
            f"tokenizer of {folder} has no chat template; put the instruct model's chat_template.jinja into the folder"
        )
    if hf.eos_token_id is None:
        raise ValueError(f"tokenizer of {folder} has no eos_token; name the end of turn in its tokenizer_config.json")
    return ChatTokenizer(hf, folder, _declared_stop_ids(folder / "generation_config.json"))


def _declared_stop_ids(file: Path) -> frozenset[int]:
    if not file.is_file():
        return frozenset()
    declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(declared if isinstance(declared, list) else [] if declared is None else [declared])


def check_tags(tokenizer: ChatTokenizer, tags: TagSet) -> None:
    """Raise ValueError if the tokenizer cannot write a tag, or the chat template opens a tag by itself."""
    header = tokenizer.generation_header()
    for tag in tags.texts:
        written = tokenizer.decode(tokenizer.encode(tag))
        if tag not in written:
            raise ValueError(
                f"tokenizer of {tokenizer.folder} writes the tag {tag!r} as {written!r}; choose tags that its"
                " vocabulary can write (prompts.tags, prompts.custom_tags)"
            )
        if tag in header:
            raise ValueError(
                f"chat template of {tokenizer.folder} itself begins the assistant's text with {tag!r}; choose another"
                " tag set (prompts.tags) or remove the tag from the template"
            )


def required_trace(problem: Problem) -> str:
    if not problem.reasoning_trace:
        raise ValueError(f"problem {problem.problem_id} has no reasoning_trace to train on; drop the row or add one")
    return problem.reasoning_trace


def check_text(tokenizer: ChatTokenizer, problem: Problem) -> None:
    """Raise ValueError as `check_question` does, or if the solution is empty."""
    check_question(tokenizer, problem.problem_id, problem.question)
    if not problem.solution.strip():
        raise ValueError(f"problem {problem.problem_id}: its solution is empty; drop the row")


def check_question(tokenizer: ChatTokenizer, problem_id: str, question: str) -> None:
    """Raise ValueError if a question contains the text of a special token, which would act as template text."""
    token = tokenizer.special_token_in(question)
    if token is not None:
        raise ValueError(
            f"problem {problem_id}: its question holds the special token {token!r}, which the chat template"
            " would take for its own; remove it from the row"
        )
