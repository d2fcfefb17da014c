r"""Verdicts on answers that can be checked, and the reward they give.

In: a problem and the text of a completion. Out: right or wrong, with the answer that was read and a named reason.
A completion never raises: whatever it holds, it is right or wrong. A problem that cannot be judged raises, once, when
the data set is checked. How answers are found and compared stands in `answers`, `mathematics`, `choice`, `countdown`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from megatron_rlt.rewards.answers import AnswerTags, answer_text, boxes, final_boxes, last_boxed, solution_section
from megatron_rlt.rewards.choice import choice_letter
from megatron_rlt.rewards.countdown import CountdownTask, expression_of, read_task, why_wrong
from megatron_rlt.rewards.mathematics import MathJudge
from megatron_rlt.types import Problem

VerifiableKind = Literal["math", "choice", "countdown", "exact"]


@dataclass(frozen=True)
class Verdict:
    """What a completion's answer is worth."""

    correct: bool
    answer: str | None  # as it was read; None if the completion has none
    reason: str  # few fixed words, for counting: "correct", "wrong", "no answer", "unreadable answer", "timed out", ...


NO_ANSWER = Verdict(False, None, "no answer")


class Verifier:
    r"""Judges the answers to one kind of question.

    math: the answer equals that of the solution, by math-verify (`mathematics.MathJudge`, also for what several ranks
      have to keep in mind). Both are read by `answers.answer_text`: the last \boxed{}, else the last expression.
    choice: the answer names the letter that the solution names (`choice.choice_letter`).
    countdown: the expression solves the task in exact arithmetic (`countdown.why_wrong`). The task is the solution, if
      that is a task in the words of `CountdownTask.question`, else the question's; no other solution is looked at.
    exact: the last words of the solution section, as many as the solution has, are the solution's words.
    """

    def __init__(self, kind: VerifiableKind, *, tags: AnswerTags | None, timeout_seconds: float) -> None:
        """`tags`: those of the completions, None if they have none. `timeout_seconds`: processor time a comparison."""
        self._kind = kind
        self._tags = tags
        self._mathematics = MathJudge(timeout_seconds=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process that math-verify runs in, if one was started."""
        self._mathematics.close()

    def check(self, problem: Problem) -> None:
        """Raise ValueError naming the problem if no answer to it could be judged."""
        fault = self._fault(problem)
        if fault is not None:
            raise ValueError(f"problem {problem.problem_id}: {fault}; correct the row or drop it")

    def verdict(self, problem: Problem, completion: str) -> Verdict:
        """Judge one completion of a problem that `check` let pass."""
        if self._kind == "exact":
            return self._exact(problem, completion)
        text = answer_text(completion, self._tags)
        if text is None:
            return NO_ANSWER
        if self._kind == "math":
            return self._math(problem, text)
        return _choice(problem, text) if self._kind == "choice" else _countdown(problem, text)

    def _fault(self, problem: Problem) -> str | None:
        shown = repr(problem.solution[-80:])
        if self._kind == "countdown":
            if _task(problem) is not None:
                return None
            return (
                "its question does not state numbers, a target and which numbers to use in a way that is surely"
                " understood; word it as `CountdownTask.question` does, or give the columns numbers, target, use_all"
            )
        if self._kind == "choice":
            return None if choice_letter(problem.solution) else f"its solution {shown} names no single letter A to Z"
        if self._kind == "exact":
            return None if problem.solution.strip() else "its solution is empty"
        reference = _reference(problem)
        outcome = self._mathematics.compare(reference, reference).outcome
        others = {content for *_, content in boxes(problem.solution)}.difference(final_boxes(problem.solution))
        if outcome == "equal" and not others:
            return None
        if others:
            return f"its solution has boxes that are not one answer, such as {min(others)[:80]!r}; keep the answer's"
        return (
            f"math-verify cannot use its solution {shown} ({outcome}): all of it must be mathematics; write the answer"
            " alone, or all of it in one \\boxed{}"
        )

    def _math(self, problem: Problem, text: str) -> Verdict:
        found = self._mathematics.compare(text, _reference(problem))
        if found.outcome in ("equal", "different"):
            return Verdict(found.outcome == "equal", found.answer, "correct" if found.outcome == "equal" else "wrong")
        box = last_boxed(text)
        return Verdict(False, found.answer if box is None else box, found.outcome)

    def _exact(self, problem: Problem, completion: str) -> Verdict:
        section = completion if self._tags is None else solution_section(completion, self._tags)
        wanted, words = problem.solution.split(), (section or "").split()
        if not words:
            return NO_ANSWER
        answer = words[-len(wanted) :]
        return Verdict(answer == wanted, " ".join(answer), "correct" if answer == wanted else "wrong")


def verifiable_reward(
    verdict: Verdict, *, well_formed: bool, correct: float, wrong: float, well_formed_bonus: float, malformed: float
) -> float:
    """Reward of a completion: what its verdict gives plus what its form gives (`answers.is_well_formed`).

    `malformed` is added as it stands, so a penalty is negative; 0.0 for both form terms rewards correctness alone.
    """
    return (correct if verdict.correct else wrong) + (well_formed_bonus if well_formed else malformed)


def _reference(problem: Problem) -> str:
    reference = answer_text(problem.solution, None)
    assert reference is not None, "without tags the whole text is the section"
    return reference


def _choice(problem: Problem, text: str) -> Verdict:
    letter = choice_letter(text)
    if letter is None:
        return NO_ANSWER
    correct = letter == choice_letter(problem.solution)
    return Verdict(correct, letter, "correct" if correct else "wrong")


def _task(problem: Problem) -> CountdownTask | None:
    stated = read_task(problem.solution)
    return stated if stated is not None and stated.question == problem.solution.strip() else read_task(problem.question)


def _countdown(problem: Problem, text: str) -> Verdict:
    task, expression = _task(problem), expression_of(text)
    if task is None:
        return Verdict(False, expression, "unreadable question")
    if not expression:
        return NO_ANSWER
    fault = why_wrong(expression, task)
    return Verdict(fault is None, expression, fault or "correct")
