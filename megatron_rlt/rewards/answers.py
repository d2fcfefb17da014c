r"""Where the answer of a completion stands: the solution section, the last \boxed{}, the form of the whole.

In: decoded text and the tags it should carry, as plain strings. Out: parts of that text. What an answer means, and
whether it is right, is left to `mathematics`, `choice`, `countdown` and `verifiable`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Between boxes that are one answer: `\boxed{5} or \boxed{7}`, `$x = \boxed{5}$ and $y = \boxed{7}$`.
_JOINT = re.compile(r"(?:[\s$,;&/]|\\[()\[\]]|\\text\{|\}|\b(?:and|or)\b)*(?:[A-Za-z]\w*\s*=\s*)?")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class AnswerTags:
    """The tags of the student's format, under the names of the tag set; the closing ones may be empty.

    Without `solution_open` the solution begins after `thought_close`.
    """

    thought_open: str
    thought_close: str
    solution_open: str
    solution_close: str

    @property
    def before_solution(self) -> str:
        """The tag behind which the solution begins."""
        return self.solution_open or self.thought_close


def answer_text(completion: str, tags: AnswerTags | None) -> str | None:
    r"""The part of a completion from which its answer is read; None if there is no such part.

    The first of these that exists: the last \boxed{} of the solution section; the last \boxed{} anywhere; what stands
    between the section's last <answer> and </answer>; the solution section. A box comes back as `\boxed{...}`, boxes
    joined by "and", "or" or a comma as one. Without tags the whole completion is the section.
    """
    section = completion if tags is None else solution_section(completion, tags)
    for text in (section, completion):
        box = None if text is None else joined_box(text)
        if box is not None:
            return f"\\boxed{{{box}}}"
    named = [] if section is None else _ANSWER_TAG.findall(section)
    return str(named[-1]) if named else section


def solution_section(completion: str, tags: AnswerTags) -> str | None:
    """What follows the last opening tag, up to the closing tag or the end; None without an opening tag."""
    _, opening, rest = completion.rpartition(tags.before_solution)
    if not opening:
        return None
    return rest.partition(tags.solution_close)[0] if tags.solution_close else rest


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, stop and content of each \boxed{} or \fbox{} whose brace is closed, without white space around it."""
    closing = _closing_braces(text)
    stops = ((box, closing.get(box.end() - 1)) for box in _BOX.finditer(text))
    return [(box.start(), stop + 1, text[box.end() : stop].strip()) for box, stop in stops if stop is not None]


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{}."""
    return next((content for *_, content in reversed(boxes(text))), None)


def joined_box(text: str) -> str | None:
    r"""Contents of the boxes that are the answer, with commas between them; None without a box."""
    contents = final_boxes(text)
    return ", ".join(contents) if contents else None


def final_boxes(text: str) -> list[str]:
    r"""Contents of the last \boxed{} and of those before it that are one answer with it, in their order."""
    contents: list[str] = []
    begin = 0
    for start, stop, content in reversed(boxes(text)):
        if contents and not (stop <= begin and _JOINT.fullmatch(text, stop, begin)):
            break
        contents.insert(0, content)
        begin = start
    return list(dict.fromkeys(contents))


def is_well_formed(completion: str, tags: AnswerTags, *, thought_is_open: bool) -> bool:
    """Whether a completion is one thought and then one solution, and nothing else.

    Every tag that is not empty stands exactly once and in order, thought and solution hold more than white space, and
    only white space stands around them. `thought_is_open`: the prompt already ended with the thought's opening tag.
    """
    rest = tags.thought_open + completion if thought_is_open else completion
    if any(rest.count(tag) != 1 for tag in vars(tags).values() if tag):
        return False
    steps = ((tags.thought_open, False), (tags.thought_close, bool(tags.solution_open)), (tags.solution_open, False))
    must_be_blank = True
    for tag, blank_after in (*steps, (tags.solution_close, True)):
        if not tag:
            continue
        piece, found, rest = rest.partition(tag)
        if not found or must_be_blank == bool(piece.strip()):
            return False
        must_be_blank = blank_after
    return must_be_blank != bool(rest.strip())


def _closing_braces(text: str) -> dict[int, int]:
    """Position of each opening brace to that of its closing one; escaped braces are ordinary signs."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for sign in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if sign[0] == "{":
            opened.append(sign.start())
        elif sign[0] == "}" and opened:
            closing[opened.pop()] = sign.start()
    return closing
