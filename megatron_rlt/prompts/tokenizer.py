"""A model folder's tokenizer with its chat template: text to ids and back, and the end-of-turn token.

Text from data and tags are encoded as plain text: `<|im_end|>` written in a solution must not end the turn. The same
holds for turn markers that are no special tokens, such as DeepSeek's `<｜User｜>`.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rlt.config.model_files import declared_stop_ids, tokenizer_settings
from megatron_rlt.config.prompts import TEMPLATE_DATE
from megatron_rlt.given_files import reason_of
from megatron_rlt.types import Problem, Span
from megatron_rlt.visible_text import is_blank

# What a template's own code can raise; what it says with `raise_exception` is a bare TemplateError.
_TEMPLATE_FAULTS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
    TemplateRuntimeError,  # such as a name that is not there
)

MARK = "turnmark"  # placeholder text, to find what the template writes around a message
_TEMPLATE_SECONDS = 5.0  # milliseconds are usual
_OWN_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that read tokenizer.json as it is


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """One model's tokenizer; `hf` is the transformers object, with a chat template and an end-of-sequence token."""

    hf: Any
    folder: Path
    declared_stop_ids: frozenset[int]  # `eos_token_id` of generation_config.json; empty without that file
    date: datetime.date  # what the chat template is told if it asks for today's

    def encode(self, text: str) -> list[int]:
        """Encode plain text: no begin-of-text token; strings of special tokens are spelt out as ordinary text."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def encode_joined(self, *texts: str) -> tuple[list[int], tuple[Span, ...]]:
        """Encode texts as the one text they make; for each, the span of the tokens that lie wholly within it."""
        encoded = self.hf(
            "".join(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans, start = [], 0
        for text in texts:
            stop = start + len(text)
            within = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if start <= a and b <= stop]
            spans.append(Span(within[0], within[-1] + 1) if within else _empty_span(encoded["offset_mapping"], start))
            start = stop
        return list(encoded["input_ids"]), tuple(spans)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode to text, special tokens included."""
        text: str = self.hf.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def chat_prefix(self, system: str, question: str) -> list[int]:
        """Ids up to where the assistant begins to write; an empty `system` sends no system message.

        Raises ValueError if the template rejects the messages or does not write the question as it is.
        """
        rendered = self.render(system, question)
        if question.strip() not in rendered:
            raise ValueError(
                f"chat template of {self.folder} does not write the question {question[:60]!r} as it is; put a"
                " template into the folder (chat_template.jinja) that takes a message's content as one text"
            )
        return self._encode_template(rendered)

    @cached_property
    def end_of_turn_id(self) -> int:
        """Special token that the template writes after an assistant's text, else the end-of-sequence token."""
        rendered = self.render("", "question", answer=MARK)
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

    def render(self, system: str, question: str, *, answer: str | None = None, header: bool = True) -> str:
        """The template's text; without an answer it ends, if `header`, where the assistant begins to write.

        Raises ValueError if the template rejects the messages.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            rendered = self.hf.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer is None and header,
                strftime_now=self.date.strftime,
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"chat template of {self.folder} is no valid template (line {error.lineno}: {error.message}); download"
                " it again"
            ) from error
        except _TEMPLATE_FAULTS as error:
            raise ValueError(
                f"chat template of {self.folder} fails ({type(error).__name__}: {reason_of(error)}); correct or"
                " download it again"
            ) from error
        except TemplateError as error:
            raise ValueError(
                f"chat template of {self.folder} refuses the messages: {error}. If it knows no system role, set the"
                ' system prompt to "" (prompts.teacher_system, prompts.student_system)'
            ) from error
        return str(rendered)


def load_tokenizer(folder: Path, *, date: datetime.date = TEMPLATE_DATE) -> ChatTokenizer:
    """Read a tokenizer from a local folder. Raises ValueError if it, its chat template or its eos token is missing."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} holds no tokenizer (no tokenizer_config.json); name a complete Hugging Face folder")
    try:
        # For some model types AutoTokenizer takes another class than the folder names, with a pre-tokenizer of its own.
        named = tokenizer_settings(folder).get("tokenizer_class")
        own = named in _OWN_FILE and (folder / "tokenizer.json").is_file()
        reader = PreTrainedTokenizerFast if own else AutoTokenizer
        hf: Any = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"tokenizer of {folder} cannot be loaded ({type(error).__name__}: {reason_of(error)}); download its files"
            " again"
        ) from error
    if not hf.is_fast:
        raise ValueError(f"tokenizer of {folder} has no tokenizer.json that can be read; save it with transformers")
    if not hf.chat_template:
        raise ValueError(
            f"tokenizer of {folder} has no chat template; put the instruct model's chat_template.jinja into the folder"
        )
    if hf.eos_token_id is None:
        raise ValueError(f"tokenizer of {folder} has no eos_token; name the end of turn in its tokenizer_config.json")
    hf.backend_tokenizer.post_processor = None  # adds special tokens, which templates write, and trims offsets
    tokenizer = ChatTokenizer(hf, folder, declared_stop_ids(folder), date)
    _check_template_ends(tokenizer)
    _protect_turn_markers(tokenizer)
    return tokenizer


def _check_template_ends(tokenizer: ChatTokenizer) -> None:
    """Raise ValueError if the chat template is still busy after `_TEMPLATE_SECONDS`: its loops could take years.

    What else it does wrong is for the first real use to say.
    """
    rendering = Thread(target=_render_once, args=(tokenizer,), daemon=True)  # one that never ends dies with the process
    rendering.start()
    rendering.join(_TEMPLATE_SECONDS)
    if rendering.is_alive():
        raise ValueError(
            f"chat template of {tokenizer.folder} takes more than {_TEMPLATE_SECONDS:g} seconds for one question;"
            " correct or download it again (chat_template.jinja)"
        )


def _render_once(tokenizer: ChatTokenizer) -> None:
    with suppress(Exception):
        tokenizer.render("", MARK)


def _protect_turn_markers(tokenizer: ChatTokenizer) -> None:
    """Make special tokens of the ordinary ones that the template writes around messages: data must not write them."""
    answered = tokenizer.render("", "question", answer=MARK)
    around = tokenizer.render("", "question") + answered[answered.rfind(MARK) :]
    added: dict[int, AddedToken] = tokenizer.hf.added_tokens_decoder
    markers = [
        AddedToken(one.content, normalized=one.normalized, lstrip=one.lstrip, rstrip=one.rstrip, special=True)
        for one in added.values()
        if not one.special and one.content.strip() and one.content in around
    ]
    tokenizer.hf.backend_tokenizer.add_special_tokens(markers)


def _empty_span(offsets: Sequence[tuple[int, int]], start: int) -> Span:
    """Where a text that begins at `start` and holds no whole token stands among the tokens."""
    place = sum(1 for _, stop in offsets if stop <= start)
    return Span(place, place)


def required_trace(problem: Problem) -> str:
    if not problem.reasoning_trace:
        raise ValueError(f"problem {problem.problem_id} has no reasoning_trace to train on; drop the row or add one")
    return problem.reasoning_trace


def check_text(tokenizer: ChatTokenizer, problem: Problem) -> None:
    """Raise ValueError as `check_question` does, or if the solution is empty."""
    check_question(tokenizer, problem.problem_id, problem.question)
    if is_blank(problem.solution):
        raise ValueError(f"problem {problem.problem_id}: its solution is empty; drop the row")


def check_question(tokenizer: ChatTokenizer, problem_id: str, question: str) -> None:
    """Raise ValueError if a question contains the text of a special token, which would act as template text."""
    token = tokenizer.special_token_in(question)
    if token is not None:
        raise ValueError(
            f"problem {problem_id}: its question holds the special token {token!r}, which the chat template"
            " would take for its own; remove it from the row"
        )
