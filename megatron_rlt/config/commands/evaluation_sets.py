"""The question sets that `evaluate` knows by name, and those it generates; `data/exercises.py` reads their rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from megatron_rlt.config.commands.job import AnswerKind
from megatron_rlt.config.commands.prepare import named_columns, require_different_columns
from megatron_rlt.config.paths import HUB
from megatron_rlt.config.section import PositiveInt, Section

QUESTION_FIELD = "{question}"
GENERATED = "countdown:"
_GENERATED = re.compile(rf"{GENERATED}([1-9]\d*):(\d+)")


class QuestionColumnConfig(Section):
    """Column names of questions whose answers can be verified."""

    question: str = "question"
    """Column of the question; optional for countdown rows."""
    answer: str = "answer"
    """Column of the reference answer; optional for countdown rows."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    choices: str = "choices"
    """Column of a list of choices (kind choice); where absent, the question must state them."""
    wrong_answers: tuple[str, ...] = ()
    """Columns of wrong choices (kind choice); they are shuffled with `answer`, in an order that depends on the question
    alone."""
    numbers: str = "numbers"
    """Column of a list of numbers (kind countdown); answers are judged by it and `target`, and where the question is
    absent, one is made of them."""
    target: str = "target"
    """Column of the target (kind countdown)."""
    use_all: str = "use_all"
    """Column of whether every number must be used (kind countdown); where absent, the question or `countdown` says."""

    @property
    def named(self) -> frozenset[str]:
        """Columns that the user named: they must exist, while those of the defaults may be absent."""
        return named_columns(self) | frozenset(self.wrong_answers)

    @model_validator(mode="after")
    def _are_different(self) -> Self:
        wrong = {f"wrong_answers[{place}]": name for place, name in enumerate(self.wrong_answers)}
        require_different_columns(dict(self) | wrong)
        return self


class CountdownConfig(Section):
    """Problems that `countdown:N:SEED` generates: reach a target from given numbers with + - * /."""

    num_numbers: Annotated[int, Field(ge=2, le=8)] = 4
    """Numbers per problem."""
    largest_number: PositiveInt = 99
    """Largest number; numbers are sampled from 1 on."""
    smallest_target: PositiveInt = 10
    """Smallest target."""
    largest_target: PositiveInt = 100
    """Largest target."""
    use_all: bool = True
    """Use every number exactly once; False: at most once."""


@dataclass(frozen=True)
class EvaluationSet:
    """Where questions come from, how they are asked, and how answers are verified."""

    name: str
    source: str | None  # a .jsonl or .parquet file, or hf://NAME[/CONFIGURATION][:SPLIT]; None: generated
    kind: AnswerKind
    columns: QuestionColumnConfig
    template: str  # the user's message, with QUESTION_FIELD in it
    num_generated: int = 0
    generator_seed: int = 0


_BOXED = f"Return your final response within \\boxed{{}}. {QUESTION_FIELD}"

_BOXED_LETTER = (
    "Return your final response within \\boxed{} and only include the letter of the choice as your final response."
    f" {QUESTION_FIELD}"
)

NAMED_SETS = {
    "aime24": EvaluationSet(
        "aime24", f"{HUB}HuggingFaceH4/aime_2024:train", "math", QuestionColumnConfig(question="problem"), _BOXED
    ),
    "math500": EvaluationSet(
        "math500",
        f"{HUB}HuggingFaceH4/MATH-500:test",
        "math",
        QuestionColumnConfig(question="problem", problem_id="unique_id"),
        _BOXED,
    ),
    "gpqa-diamond": EvaluationSet(
        "gpqa-diamond",
        f"{HUB}Idavidrein/gpqa/gpqa_diamond:train",
        "choice",
        QuestionColumnConfig(
            question="Question",
            answer="Correct Answer",
            problem_id="Record ID",
            wrong_answers=tuple(f"Incorrect Answer {number}" for number in (1, 2, 3)),
        ),
        _BOXED_LETTER,
    ),
}


def known_set(data: str) -> EvaluationSet | None:
    """The set that a configuration's `data` names, with its own template; None for a file or hub data set."""
    generated = _GENERATED.fullmatch(data)
    if generated is None:
        return NAMED_SETS.get(data)
    count, seed = (int(digits) for digits in generated.groups())
    return EvaluationSet(data, None, "countdown", QuestionColumnConfig(), QUESTION_FIELD, count, seed)
