"""Questions that are open while something else happens: parts, what stays after a failure, and the clock."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from megatron_rlt.rollout.vllm.client import EngineLostError, ServedChoice
from megatron_rlt.rollout.vllm.pending_requests import OpenQuestions, WorkClock

PARTS = (range(2), range(2, 3))
WAIT_SECONDS = 5.0


def _answer(number: int) -> list[ServedChoice]:
    return [ServedChoice((number,), (-1.0,), "stop")]


def _questions(ask: Callable[[int], list[ServedChoice]], clock: WorkClock | None = None) -> OpenQuestions:
    return OpenQuestions(ask, PARTS, clock or WorkClock(), max_concurrent=3)


def _take(questions: OpenQuestions) -> dict[int, list[tuple[int, int]]]:
    """Ids and versions of all parts that are complete."""
    return {
        index: [(answer.choices[0].token_ids[0], answer.policy_version) for answer in questions.give(index)]
        for index in questions.wait()
    }


def test_a_part_comes_when_all_of_it_is_answered_and_once() -> None:
    may_answer = {number: threading.Event() for number in range(3)}

    def ask(number: int) -> list[ServedChoice]:
        assert may_answer[number].wait(WAIT_SECONDS)
        return _answer(number)

    questions = _questions(ask)
    questions.ask(7)
    may_answer[1].set()
    may_answer[2].set()
    assert _take(questions) == {1: [(2, 7)]}, "the first part's first question is still open"
    may_answer[0].set()
    assert _take(questions) == {0: [(0, 7), (1, 7)]}
    assert _take(questions) == {}, "all were given"
    questions.close()


def test_only_what_was_not_answered_is_asked_again_and_has_the_version_that_answered_it() -> None:
    asked: Counter[int] = Counter()

    def ask(number: int) -> list[ServedChoice]:
        asked[number] += 1
        if number == 1 and asked[1] == 1:
            raise EngineLostError("gone")
        return _answer(number)

    questions = _questions(ask)
    questions.ask(3)
    assert _take(questions) == {1: [(2, 3)]}
    with pytest.raises(EngineLostError, match="gone"):
        questions.wait()
    questions.ask(4)
    assert _take(questions) == {0: [(0, 3), (1, 4)]}
    assert asked == {0: 1, 1: 2, 2: 1}
    questions.close()


def test_answers_that_are_not_trusted_are_asked_again() -> None:
    asked: Counter[int] = Counter()

    def ask(number: int) -> list[ServedChoice]:
        asked[number] += 1
        return _answer(number)

    questions = _questions(ask)
    questions.ask(0)
    complete = questions.wait()
    while len(complete) < 2:
        complete = questions.wait()
    questions.forget(complete)
    questions.ask(1)
    come: dict[int, list[tuple[int, int]]] = {}
    while len(come) < 2:
        come |= _take(questions)
    assert come == {0: [(0, 1), (1, 1)], 1: [(2, 1)]}
    assert asked == {0: 2, 1: 2, 2: 2}
    questions.close()


def test_the_clock_counts_time_with_an_open_question_once() -> None:
    clock, may_answer = WorkClock(), threading.Event()

    def ask(number: int) -> list[ServedChoice]:
        assert may_answer.wait(WAIT_SECONDS)
        return _answer(number)

    questions = _questions(ask, clock)
    time.sleep(0.1)
    assert clock.take() == 0.0, "nothing was asked"
    start = time.monotonic()
    questions.ask(0)
    time.sleep(0.1)
    half = clock.take()
    assert 0.1 <= half <= time.monotonic() - start, "three open questions are one working engine"
    may_answer.set()
    while complete := questions.wait():
        for index in complete:
            questions.give(index)
    questions.close()
    rest, end = clock.take(), time.monotonic()
    assert 0.0 <= rest <= end - start - half
    time.sleep(0.05)
    assert clock.take() == 0.0
