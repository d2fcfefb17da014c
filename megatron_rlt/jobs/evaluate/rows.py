"""What `evaluate` asks: the rows of its set, generated or read, and the pass over them before a model loads.

In: the set, the model's student format, a judge. Out: exercises as tasks with the text that is asked, and rejected rows
with their reasons. Reading is `data/exercises.py`'s, generating and judging are `rewards/`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_rlt.config.commands.evaluate import EvaluationSet
from megatron_rlt.config.sections import CountdownConfig
from megatron_rlt.data.exercises import Exercise, read_exercises
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError
from megatron_rlt.jobs.run.validate_rows import Survey, survey_rows
from megatron_rlt.prompts.student import StudentFormat, asked_text
from megatron_rlt.rewards.countdown import CountdownTask
from megatron_rlt.rewards.countdown_problems import draw_countdown
from megatron_rlt.types import Problem


@dataclass(frozen=True, eq=False)
class Prompter:
    """Words and encodes what the model is asked."""

    student: StudentFormat
    template: str
    prefill_thought: bool

    def asked(self, exercise: Exercise) -> str:
        """The user's turn."""
        return asked_text(exercise.problem.question, exercise.choices, template=self.template)

    def token_ids(self, exercise: Exercise) -> Tensor:
        """`[P]` int64: what the model continues. Raises ValueError as `StudentFormat.solving_prompt`."""
        return self.student.solving_prompt(
            exercise.problem.problem_id, self.asked(exercise), prefill_thought=self.prefill_thought
        )


@dataclass(frozen=True, eq=False)
class ExerciseCheck:
    """Whether a row's answer can be judged and its prompt be read."""

    prompter: Prompter
    check_answer: Callable[[Problem], None]  # raises ValueError
    max_prompt_tokens: int

    def __call__(self, exercise: Exercise) -> None:
        """Raise UnusableRowError for a row that cannot be used."""
        try:
            self.check_answer(exercise.problem)
        except ValueError as error:
            raise UnusableRowError(RejectReason.UNREADABLE_ANSWER, None, str(error)) from error
        try:
            length = len(self.prompter.token_ids(exercise))
        except ValueError as error:
            raise UnusableRowError(RejectReason.UNUSABLE_PROMPT, None, str(error)) from error
        if length > self.max_prompt_tokens:
            detail = f"its prompt has {length} tokens, more than prompts.max_prompt_tokens = {self.max_prompt_tokens}"
            raise UnusableRowError(RejectReason.TOO_LONG, None, detail)


def survey_exercises(
    asked: EvaluationSet, countdown: CountdownConfig, check: ExerciseCheck, on_row: Callable[[int], None]
) -> tuple[Survey, list[Exercise]]:
    """Read or generate the set and look at every row. Collective; the same on every rank.

    Returns:
        What was found, and the usable exercises in their order.

    Raises:
        ValueError: the set cannot be read or generated, or none of its rows is usable.
    """
    rows = list(_rows(asked, countdown))
    survey = survey_rows(asked.name, rows, check, on_row)
    rejected = {row.row for row in survey.rejected}
    return survey, [row for row in rows if isinstance(row, Exercise) and row.row not in rejected]


def _rows(asked: EvaluationSet, countdown: CountdownConfig) -> Iterator[Exercise | RejectedRow]:
    if asked.source is None:
        return _generated(asked, countdown)

    def state_countdown(numbers: Sequence[int], target: int) -> str:
        return CountdownTask(tuple(numbers), target, use_all=countdown.use_all).question

    return read_exercises(asked.source, asked.kind, asked.columns, state_countdown=state_countdown)


def _generated(asked: EvaluationSet, countdown: CountdownConfig) -> Iterator[Exercise]:
    problems = draw_countdown(asked.generator_seed, asked.num_generated, **countdown.model_dump())
    for number, problem in enumerate(problems, start=1):
        yield Exercise(number, problem.row(f"countdown-{asked.generator_seed}-{number}"), ())
