"""Texts for property tests: ordinary writing, any unicode, and pieces of tags and special tokens.

And what a format should make of them, in this file's own words: the paper's bytes for both tag sets.
"""

import re

from hypothesis import settings
from hypothesis import strategies as st

from megatron_rlt.prompts.tags import R1, STRATOS, TagSet
from megatron_rlt.visible_text import is_blank

# No deadline: first examples load tokenizers, and the suite shares two cores.
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>")
FRAGMENTS = ("<|", "|>", "<|end_of_", ".<|end_of_explanation", "</", "\n\n", ".\n\n", " ", "é", "中文", "🙂", "x = 3")
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
any_text = st.lists(
    st.one_of(plain_text, st.sampled_from((*STRATOS.texts, *R1.texts, *SPECIAL, *FRAGMENTS))), max_size=5
).map("".join)
solutions = any_text.filter(lambda text: not is_blank(text))
questions = any_text.filter(lambda text: not any(token in text for token in (*SPECIAL, "<|end")))


def bare(text: str) -> str:
    """Without the newlines that both tag sets write around a text, two at most."""
    found = re.fullmatch(r"\n{0,2}(.*?)\n{0,2}", text, re.DOTALL)
    assert found is not None
    return found[1]


def student_text(tags: TagSet, explanation: str, solution: str) -> str:
    """What a student that explains like this writes: explanation and solution without newlines at their ends."""
    if tags == R1:
        return f"<think>\n{explanation}\n</think>\n\n{solution}"
    thought = f"<|begin_of_thought|>\n\n{explanation}\n\n<|end_of_thought|>"
    return f"{thought}\n\n<|begin_of_solution|>\n\n{solution}\n\n<|end_of_solution|>"


def teacher_text(tags: TagSet, explanation: str, solution: str) -> str:
    """What a teacher writes, its prompt included."""
    if tags == R1:
        return f"<solution>\n{solution}\n</solution>\n\n<explanation>\n{explanation}\n</explanation>"
    shown = f"<|begin_of_solution|>\n\n{solution}\n\n<|end_of_solution|>"
    return f"{shown}\n\n<|begin_of_explanation|>\n\n{explanation}\n\n<|end_of_explanation|>"


def solution_section(tags: TagSet, solution: str) -> str:
    """What stands between the student's solution tags, or behind its thought."""
    return bare(solution) if tags == R1 else f"\n\n{bare(solution)}\n\n"


def is_end_of_section(text: str, section: str) -> bool:
    """Whether a span's text is a section, but for newlines that the tokenizer joins with the tag before them."""
    return section.endswith(text) and not section[: len(section) - len(text)].strip()
