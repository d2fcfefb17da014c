r"""Where the answer of a completion stands: the solution section, the last \boxed{}, the form of the whole.

In: decoded text and the tags it should carry, as plain strings. Out: parts of that text. What an answer means, and
whether it is right, is left to `mathematics`, `choice`, `countdown` and `verifiable`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


@dataclass(frozen=True)
class AnswerTags:
    """The tags of the student's format, under the names of the tag set; the closing ones may be empty."""

    thought_open: str
    thought_close: str
    solution_open: str
    solution_close: str


def answer_text(completion: str, tags: AnswerTags | None) -> str | None:
    r"""The part of a completion from which its answer is read; None if there is no such part.

    The first of these that exists: the last \boxed{} of the solution section; the last \boxed{} anywhere; the solution
    section. A box comes back as `\boxed{...}`. Without tags the whole completion is the section.
    """
    section = completion if tags is None else solution_section(completion, tags)
    for text in (section, completion):
        box = None if text is None else last_boxed(text)
        if box is not None:
            return f"\\boxed{{{box}}}"
    return section


def solution_section(completion: str, tags: AnswerTags) -> str | None:
    """What follows the last opening tag, up to the closing tag or the end; None without an opening tag."""
    _, opening, rest = completion.rpartition(tags.solution_open)
    if not opening:
        return None
    return rest.partition(tags.solution_close)[0] if tags.solution_close else rest


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} (or \fbox{}) whose brace is closed, white space around it taken off."""
    for box in reversed(list(_BOX.finditer(text))):
        stop = _closing_brace(text, box.end())
        if stop is not None:
            return text[box.end() : stop].strip()
    return None


def is_well_formed(completion: str, tags: AnswerTags, *, thought_is_open: bool) -> bool:
    """Whether a completion is one thought and then one solution, and nothing else.

    Every tag that is not empty stands exactly once and in order, thought and solution hold more than white space, and
    only white space stands around them. `thought_is_open`: the prompt already ended with the thought's opening tag.
    """
    rest = tags.thought_open + completion if thought_is_open else completion
    if any(rest.count(tag) != 1 for tag in vars(tags).values() if tag):
        return False
    steps = ((tags.thought_open, False), (tags.thought_close, True), (tags.solution_open, False))
    must_be_blank = True
    for tag, blank_after in (*steps, (tags.solution_close, True)):
        if not tag:
            continue
        piece, found, rest = rest.partition(tag)
        if not found or must_be_blank == bool(piece.strip()):
            return False
        must_be_blank = blank_after
    return must_be_blank != bool(rest.strip())


def _closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one before `start`; escaped braces are ordinary signs."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return at
        at += 1
    return None
