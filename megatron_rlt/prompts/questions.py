"""The user's turn of a question that a student solves: choices listed below it, instructions around it.

In: a question, its choices, a template. Out: text. The chat template and the ids are the student format's.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlt.config.evaluation_sets import QUESTION_FIELD

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def asked_text(question: str, choices: Sequence[str], *, template: str) -> str:
    """The question with its choices as lines `A) ...`, in place of `{question}` in the template.

    Args:
        choices: at most 26; none where the question states them itself, or has none.
        template: other braces in it are ordinary text.
    """
    lines = [f"{letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    listed = "\n".join([question, "", *lines]) if lines else question
    return template.replace(QUESTION_FIELD, listed)
