"""The text around question, solution and explanation: tags, system prompts, the longest prompt."""

from __future__ import annotations

import datetime
from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from megatron_rlt.config.section import NonEmptyText, PositiveInt, Section

TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the one that Llama's own templates write where no clock is at hand
_MAY_BE_EQUAL = ({"thought_open", "explanation_open"}, {"thought_close", "explanation_close"})


def _as_date(value: object) -> object:
    """YAML's text: where a validator of the whole configuration has looked at it before, a strict date refuses it."""
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


class TagsConfig(Section):
    """Custom tags; the closing tags of thought and solution may be empty, the others may not."""

    thought_open: NonEmptyText
    """Before the explanation in the student's text."""
    thought_close: str = ""
    """After the explanation in the student's text."""
    solution_open: NonEmptyText
    """Before the solution, in the teacher's and the student's text."""
    solution_close: str = ""
    """After the solution, in the teacher's and the student's text."""
    explanation_open: NonEmptyText
    """Ends the teacher's prompt: its explanation begins here."""
    explanation_close: NonEmptyText
    """The end tag that the teacher writes."""
    separator: str = "\n\n"
    """Text between two sections."""
    padding: str = "\n\n"
    """Text inside each pair of tags, next to both: around thought, solution and explanation."""
    student_solution_tags: bool = True
    """Whether the student writes the solution's tags; false: its solution is what follows thought_close, which then may
    not be empty."""

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        """Equal tags cannot be told apart; only what opens, or closes, an explanation for both models may be equal."""
        written = {name: text.strip() for name, text in dict(self).items() if name.endswith(("_open", "_close"))}
        tags = {name: text for name, text in written.items() if text}
        for first, second in combinations(tags, 2):
            if tags[first] == tags[second] and {first, second} not in _MAY_BE_EQUAL:
                raise ValueError(f"{first} and {second} are equal, {tags[first]!r}, and must be different tags")
        return self


class PromptConfig(Section):
    """Text around question, solution and explanation."""

    tags: Literal["stratos", "r1"] = "stratos"
    """Tag set: `stratos` writes <|begin_of_thought|>, `r1` writes <think>."""
    custom_tags: TagsConfig | None = None
    """Tags that replace the set named by `tags`; None keeps that set."""
    teacher_system: str | None = None
    """The teacher's system prompt; None uses the tag set's, an empty string sends none."""
    student_system: str | None = None
    """The student's system prompt; None uses the tag set's, an empty string sends none."""
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = TEMPLATE_DATE
    """What a chat template that writes today's date is told: the clock would give one run several prompts."""
    exact_text: bool = True
    """Refuse a tokenizer whose ids do not give a text back. False: for toy vocabularies of whole words."""
    max_prompt_tokens: PositiveInt = 16384
    """Longest prompt in tokens (the teacher's; in `evaluate` and `rlvr` the student's). A longer row is rejected by
    its id."""
