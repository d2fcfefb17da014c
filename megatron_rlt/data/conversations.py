"""Parses a Bespoke-Stratos `conversations` cell into question, reasoning trace and solution.

The markers belong to that public data format; the tags that models are trained on are in `prompts`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rlt.data.rejection import RejectReason, UnusableRowError

MARKERS = ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>")
ANSWER = re.compile(r"\s*{}(.*){}\s*{}(.*){}\s*".format(*map(re.escape, MARKERS)), re.DOTALL)
USER_ROLES = frozenset({"user", "human"})
ASSISTANT_ROLES = frozenset({"assistant", "gpt"})
SYSTEM_ROLE = "system"  # its text is the format's, not the row's; prompts bring their own


@dataclass(frozen=True)
class Conversation:
    """One parsed conversation: texts as they stand, with the newlines that models of this format have seen."""

    question: str
    reasoning_trace: str
    solution: str


def parse_conversation(turns: object, column: str) -> Conversation:
    """Parse a list of `{from|role, value|content}` turns: one user turn, then one assistant turn.

    Raises UnusableRowError for any other shape, and for text outside the four markers, which would be lost.
    """
    if not isinstance(turns, list):
        raise UnusableRowError(RejectReason.WRONG_TYPE, column, f"{type(turns).__name__} instead of a list of turns")
    spoken = [turn for turn in (_role_and_text(turn, column) for turn in turns) if turn[0] != SYSTEM_ROLE]
    roles = [role for role, _ in spoken]
    if len(roles) != 2 or roles[0] not in USER_ROLES or roles[1] not in ASSISTANT_ROLES:
        raise UnusableRowError(RejectReason.BAD_CONVERSATION, column, f"turns {roles} instead of user, assistant")
    (_, question), (_, answer) = spoken
    match = ANSWER.fullmatch(answer)
    if match is None or any(answer.count(marker) != 1 for marker in MARKERS):
        detail = f"the assistant's turn is not {MARKERS[0]}..{MARKERS[1]} {MARKERS[2]}..{MARKERS[3]}, each once"
        raise UnusableRowError(RejectReason.BAD_CONVERSATION, column, detail)
    return Conversation(question, match[1], match[2])


def _role_and_text(turn: object, column: str) -> tuple[str, str]:
    if isinstance(turn, dict):
        for own, other in (("from", "role"), ("value", "content")):
            if turn.get(own, turn.get(other)) != turn.get(other, turn.get(own)):
                raise UnusableRowError(RejectReason.AMBIGUOUS, column, f"a turn's {own!r} and {other!r} differ")
        role = turn["from"] if "from" in turn else turn.get("role")
        text = turn["value"] if "value" in turn else turn.get("content")
        if isinstance(role, str) and isinstance(text, str):
            return role, text
    detail = f"a turn is {str(turn)[:80]!r} instead of {{from|role, value|content}} with text"
    raise UnusableRowError(RejectReason.BAD_CONVERSATION, column, detail)
