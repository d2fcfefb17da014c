"""Does a chat template write what it is given, and leave the assistant's text to the model? Asked once at start."""

from __future__ import annotations

import re

from megatron_rlt.prompts.tags import NAMED, TagSet
from megatron_rlt.prompts.tokenizer import MARK, ChatTokenizer

# Signs that a template might escape, strip, cut at or take apart.
_QUESTION = 'Is 1 < 2 & "0.4" > \\frac{1}{3}?\n\n  A) {yes}  \n\nB) it\'s 中文 é'
_CLOSED_SECTION = re.compile(r"\s*<([^<>/]+)>.*</\1>\s*", re.DOTALL)
_CLOSES = re.compile(r"\s*(</|\[/|<\|end_)")


def check_template(tokenizer: ChatTokenizer, *, system: str, system_key: str) -> None:
    """Raise ValueError unless system prompt and question stand in the prompt, in this order, then a header.

    `system_key` of the configuration is named in the remedy.
    """
    rendered, told = tokenizer.render(system, _QUESTION), system.strip()
    if _QUESTION not in rendered:
        raise ValueError(
            f"chat template of {tokenizer.folder} does not write the question as it is; put a template into the folder"
            " (chat_template.jinja) that takes a message's content as one text"
        )
    if told not in rendered:
        raise ValueError(
            f"chat template of {tokenizer.folder} does not write the system prompt; set {system_key} to"
            ' "", or put a template with a system role into the folder (chat_template.jinja)'
        )
    if _QUESTION not in rendered[rendered.index(told) + len(told) :]:
        raise ValueError(
            f"chat template of {tokenizer.folder} does not write the question after the system prompt; put the instruct"
            " model's template into the folder (chat_template.jinja)"
        )
    header, expected = _header(tokenizer), _before_answer(tokenizer)
    if expected is None or header.startswith(expected.rstrip()):
        return
    opens_turn = rendered.rstrip() != tokenizer.render(system, _QUESTION, header=False).rstrip()
    if not opens_turn or not expected.startswith(header.rstrip()):
        raise ValueError(
            f"chat template of {tokenizer.folder} does not open the assistant's turn as it writes one: asked to"
            f" (add_generation_prompt), it writes {header!r}, before an answer {expected!r}; put the instruct model's"
            " template into the folder (chat_template.jinja)"
        )


def check_tags(tokenizer: ChatTokenizer, tags: TagSet) -> None:
    """Raise ValueError if the tokenizer cannot write a tag, or the chat template begins the assistant's text itself."""
    if not (tags.student_solution_tags or tags.thought_close):
        raise ValueError(
            "prompts.custom_tags: student_solution_tags=false needs a thought_close, after which the solution begins"
        )
    for tag in tags.texts:
        written = tokenizer.decode(tokenizer.encode(tag))
        if tag not in written:
            raise ValueError(
                f"tokenizer of {tokenizer.folder} writes the tag {tag!r} as {written!r}; choose tags that its"
                " vocabulary can write (prompts.tags, prompts.custom_tags)"
            )
    begun = _begun_by_template(tokenizer, tags)
    if begun is not None:
        raise ValueError(
            f"chat template of {tokenizer.folder} itself begins the assistant's text with {begun!r}, a section that"
            " this format neither expects nor closes; remove it from the template (chat_template.jinja)"
        )


def _begun_by_template(tokenizer: ChatTokenizer, tags: TagSet) -> str | None:
    """What the template writes of an answer that the model should begin; None where it only opens the turn.

    A section that is closed again, such as an empty thought, is the template's own affair.
    """
    header, expected = _header(tokenizer), _before_answer(tokenizer)
    for tag in tags.texts:
        if tag in header:
            return tag
    for named in NAMED.values():
        for opening, closing in (
            (named.thought_open, named.thought_close),
            (named.solution_open, named.solution_close),
        ):
            if header.rfind(opening) > header.rfind(closing):
                return opening
    if expected is None:
        return None
    if header.startswith(expected.rstrip()):
        begun = header[len(expected.rstrip()) :].strip()
        return begun if begun and not _CLOSED_SECTION.fullmatch(begun) else None
    begins_closing = expected.startswith(header) and _CLOSES.match(expected[len(header) :])
    return header.strip().splitlines()[-1] if begins_closing else None


def _header(tokenizer: ChatTokenizer) -> str:
    """Text that the template writes after the user's message where the assistant shall begin."""
    rendered = tokenizer.render("", MARK)
    return rendered[rendered.rfind(MARK) + len(MARK) :]


def _before_answer(tokenizer: ChatTokenizer) -> str | None:
    """Text that the template writes between the user's message and an answer; None where it writes no answer."""
    question, answer = f"{MARK}s", f"{MARK}a"
    _, asked, rest = tokenizer.render("", question, answer=answer).partition(question)
    before, answered, _ = rest.partition(answer)
    return before if asked and answered else None
