"""Verdicts of whole completions, the check of problems, and the reward that verdicts give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.rewards.answers import AnswerTags
from megatron_rlt.rewards.verifiable import Verdict, VerifiableKind, Verifier, verifiable_reward
from megatron_rlt.types import Problem

TAGS = AnswerTags("<think>", "</think>", "<solution>", "</solution>")
COUNTDOWN = Problem("c", "Using the numbers 3, 5, 2, make 16.", "(3 + 5) * 2 = 16")
MATH = Problem("m", "Half of one?", r"Half of one is $\frac12$, so the answer is \boxed{\frac{1}{2}}.")
CHOICE = Problem("l", "Which? A) one B) two", "B")
EXACT = Problem("e", "5 +5 *5", "so 1")


Verifiers = dict[VerifiableKind, Verifier]


def all_kinds(tags: AnswerTags | None) -> Iterator[Verifiers]:
    verifiers: Verifiers = {kind: Verifier(kind, tags=tags, timeout_seconds=20.0) for kind in get_args(VerifiableKind)}
    yield verifiers
    for verifier in verifiers.values():
        verifier.close()


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    yield from all_kinds(TAGS)


@pytest.fixture(scope="module")
def untagged() -> Iterator[Verifiers]:
    yield from all_kinds(None)


@pytest.mark.parametrize(
    ("kind", "problem", "completion", "verdict"),
    [
        ("math", MATH, r"<think>1</think><solution>It is \boxed{0.5}</solution>", (True, r"\frac{1}{2}", "correct")),
        ("math", MATH, "<think>1</think><solution>Hence $x = 0.5$.</solution>", (True, "x = 0.5", "correct")),
        ("math", MATH, "<think>0.5</think><solution>It is 2.</solution>", (False, "2", "wrong")),
        ("math", MATH, "<think>0.5", (False, None, "no answer")),
        ("math", MATH, r"<solution>\boxed{\frac{1}{}}</solution>", (False, r"\frac{1}{}", "unreadable answer")),
        ("choice", CHOICE, "<solution>The answer is B.</solution>", (True, "B", "correct")),
        ("choice", CHOICE, r"<think>\boxed{A}", (False, "A", "wrong")),
        ("choice", CHOICE, "<solution>both</solution>", (False, None, "no answer")),
        ("countdown", COUNTDOWN, "<solution>2 * (5 + 3)</solution>", (True, "2 * (5 + 3)", "correct")),
        ("countdown", COUNTDOWN, "<solution>2 * 5 * 3</solution>", (False, "2 * 5 * 3", "wrong value")),
        ("countdown", COUNTDOWN, "<solution> </solution>", (False, None, "no answer")),
        ("exact", EXACT, "<solution>and so  1\n</solution>", (True, "so 1", "correct")),
        ("exact", EXACT, "<solution>so 11</solution>", (False, "so 11", "wrong")),
        ("exact", EXACT, "<solution>1</solution>", (False, "1", "wrong")),
        ("exact", EXACT, "<think>so 1", (False, None, "no answer")),
    ],
)
def test_verdicts_by_example(
    verifiers: Verifiers, kind: VerifiableKind, problem: Problem, completion: str, verdict: Any
) -> None:
    verifiers[kind].check(problem)
    assert verifiers[kind].verdict(problem, completion) == Verdict(*verdict)


def test_without_tags_the_whole_completion_is_read(untagged: Verifiers) -> None:
    assert untagged["exact"].verdict(EXACT, "I say so 1").correct
    assert untagged["math"].verdict(MATH, "The answer is 1/2").correct
    assert untagged["choice"].verdict(CHOICE, "I take it that the answer is (B)").correct


@pytest.mark.parametrize(
    ("kind", "problem", "fault"),
    [
        ("math", Problem("p7", "?", "There is none."), r"problem p7: math-verify .*'There is none.' \(unreadable"),
        ("choice", Problem("p7", "?", "A or B"), "problem p7: its solution 'A or B' names no single letter"),
        ("countdown", Problem("p7", "What?", "3 + 4"), "problem p7: its question does not state"),
        ("exact", Problem("p7", "?", " "), "problem p7: its solution is empty"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_named(
    verifiers: Verifiers, kind: VerifiableKind, problem: Problem, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault + r".*; correct the row or drop it"):
        verifiers[kind].check(problem)


@settings(max_examples=60, deadline=None)
@given(body=st.text(max_size=60), boxed=st.booleans())
def test_no_completion_raises(verifiers: Verifiers, body: str, boxed: bool) -> None:
    completion = f"<solution>\\boxed{{{body}}}" if boxed else f"<solution>{body}"
    problems: dict[VerifiableKind, Problem] = {"math": MATH, "choice": CHOICE, "countdown": COUNTDOWN, "exact": EXACT}
    for kind, problem in problems.items():
        assert isinstance(verifiers[kind].verdict(problem, completion), Verdict)


@pytest.mark.parametrize(
    ("correct", "well_formed", "reward"),
    [(True, True, 1.25), (True, False, 0.5), (False, True, 0.25), (False, False, -0.5)],
)
def test_reward_is_verdict_plus_form(correct: bool, well_formed: bool, reward: float) -> None:
    """1 or 0 for the verdict, + 0.25 or - 0.5 for the form."""
    verdict = Verdict(correct, "x", "wrong")
    value = verifiable_reward(
        verdict, well_formed=well_formed, correct=1.0, wrong=0.0, well_formed_bonus=0.25, malformed=-0.5
    )
    assert value == reward
