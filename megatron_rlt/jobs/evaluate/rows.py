"""Questions of `evaluate`: reads or generates the rows of its set and checks them before a model loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_rlt.config.commands.evaluation_sets import CountdownConfig, EvaluationSet
from megatron_rlt.data.exercises import Exercise, read_exercises
from megatron_rlt.data.rejection import RejectedRow, RejectReason, UnusableRowError, rejected_as
from megatron_rlt.jobs.run.validate_rows import RowReport, validate_rows
from megatron_rlt.prompts.student import StudentFormat, asked_text
from megatron_rlt.rewards.countdown import CountdownTask, asks_for_all
from megatron_rlt.rewards.countdown_problems import draw_countdown
from megatron_rlt.types import OnProgress, Problem


@dataclass(frozen=True, eq=False)
class Prompter:
    """Formats and encodes questions for the model."""

    student: StudentFormat
    template: str
    prefill_thought: bool

    def asked(self, exercise: Exercise) -> str:
        """The user's message."""
        return asked_text(exercise.problem.question, exercise.choices, template=self.template)

    def token_ids(self, exercise: Exercise) -> Tensor:
        """`[P]` int64 prompt. Raises ValueError as `StudentFormat.solving_prompt` does."""
        problem_id, question = exercise.problem.problem_id, self.asked(exercise)
        return self.student.solving_prompt(problem_id, question, prefill_thought=self.prefill_thought)


@dataclass(frozen=True, eq=False)
class ExerciseCheck:
    """Checks that a row's answer can be judged and that its prompt is short enough."""

    prompter: Prompter
    check_answer: Callable[[Problem], None]  # raises ValueError
    max_prompt_tokens: int

    def __call__(self, exercise: Exercise) -> None:
        """Raise UnusableRowError for a row that cannot be used."""
        with rejected_as(RejectReason.UNREADABLE_ANSWER):
            self.check_answer(exercise.problem)
        with rejected_as(RejectReason.UNUSABLE_PROMPT):
            length = len(self.prompter.token_ids(exercise))
        if length > self.max_prompt_tokens:
            detail = f"its prompt has {length} tokens, more than prompts.max_prompt_tokens = {self.max_prompt_tokens}"
            raise UnusableRowError(RejectReason.TOO_LONG, None, detail)


def validate_exercises(
    asked: EvaluationSet, countdown: CountdownConfig, check: ExerciseCheck, on_row: OnProgress
) -> tuple[RowReport, list[Exercise]]:
    """Read or generate the set and check every row. Collective; returns the report and the usable exercises in order.

    Raises ValueError if the set cannot be read or generated, or if none of its rows is usable.
    """
    rows = list(_rows(asked, countdown))
    report = validate_rows(asked.name, rows, check, on_row)
    return report, list(report.usable(rows))


def _rows(asked: EvaluationSet, countdown: CountdownConfig) -> Iterator[Exercise | RejectedRow]:
    if asked.source is None:
        return _generated(asked, countdown)

    def state_countdown(numbers: Sequence[int], target: int, use_all: bool | None, question: object) -> str:
        if use_all is None:
            use_all = asks_for_all(question) if isinstance(question, str) else countdown.use_all
        if use_all is None:
            detail = "the question does not say clearly whether every number must be used; say it in this column"
            raise UnusableRowError(RejectReason.UNREADABLE_ANSWER, asked.columns.use_all, detail)
        return CountdownTask(tuple(numbers), target, use_all).question

    return read_exercises(asked.source, asked.kind, asked.columns, state_countdown=state_countdown)


def _generated(asked: EvaluationSet, countdown: CountdownConfig) -> Iterator[Exercise]:
    problems = draw_countdown(asked.generator_seed, asked.num_generated, **countdown.model_dump())
    for number, problem in enumerate(problems, start=1):
        yield Exercise(number, problem.row(f"countdown-{asked.generator_seed}-{number}"), ())
