"""Requests that are pending while something else happens: parts, what stays after a failure, and the clock."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from megatron_rlt.rollout.vllm.client import EngineLostError, ServerCompletion
from megatron_rlt.rollout.vllm.pending_requests import BusyClock, PendingRequests

PARTS = (range(2), range(2, 3))
WAIT_SECONDS = 5.0


def _answer(number: int, attempt: int = 1) -> list[ServerCompletion]:
    return [ServerCompletion((number, attempt), (-1.0, -1.0), "stop")]


def _requests(send: Callable[[int], list[ServerCompletion]], clock: BusyClock | None = None) -> PendingRequests:
    return PendingRequests(send, PARTS, clock or BusyClock(), max_concurrent=3)


def _pop(requests: PendingRequests) -> dict[int, list[tuple[int, ...]]]:
    """Of all parts that are complete, number and attempt of each request that was answered, and the version."""
    return {
        index: [(*answer.completions[0].token_ids, answer.policy_version) for answer in requests.pop(index)]
        for index in requests.wait()
    }


def test_a_part_comes_when_all_of_it_is_answered_and_once() -> None:
    may_answer = {number: threading.Event() for number in range(3)}

    def send(number: int) -> list[ServerCompletion]:
        assert may_answer[number].wait(WAIT_SECONDS)
        return _answer(number)

    requests = _requests(send)
    requests.send(7)
    may_answer[1].set()
    may_answer[2].set()
    assert _pop(requests) == {1: [(2, 1, 7)]}, "the first part's first request is still pending"
    may_answer[0].set()
    assert _pop(requests) == {0: [(0, 1, 7), (1, 1, 7)]}
    assert _pop(requests) == {}, "all were popped"
    requests.close()


def test_only_what_was_not_answered_is_sent_again_and_has_the_version_that_answered_it() -> None:
    sent: Counter[int] = Counter()

    def send(number: int) -> list[ServerCompletion]:
        sent[number] += 1
        if number == 1 and sent[1] == 1:
            raise EngineLostError("gone")
        return _answer(number, sent[number])

    requests = _requests(send)
    requests.send(3)
    assert _pop(requests) == {1: [(2, 1, 3)]}
    with pytest.raises(EngineLostError, match="gone"):
        requests.wait()
    requests.send(4)
    assert _pop(requests) == {0: [(0, 1, 3), (1, 2, 4)]}
    requests.close()


def test_answers_that_are_not_trusted_are_sent_again() -> None:
    sent: Counter[int] = Counter()

    def send(number: int) -> list[ServerCompletion]:
        sent[number] += 1
        return _answer(number, sent[number])

    requests = _requests(send)
    requests.send(0)
    complete = requests.wait()
    while len(complete) < 2:
        complete = requests.wait()
    requests.discard(complete)
    requests.send(1)
    come: dict[int, list[tuple[int, ...]]] = {}
    while len(come) < 2:
        come |= _pop(requests)
    assert come == {0: [(0, 2, 1), (1, 2, 1)], 1: [(2, 2, 1)]}
    requests.close()


def test_the_clock_counts_time_with_a_pending_request_once() -> None:
    clock, may_answer = BusyClock(), threading.Event()

    def send(number: int) -> list[ServerCompletion]:
        assert may_answer.wait(WAIT_SECONDS)
        return _answer(number)

    requests = _requests(send, clock)
    time.sleep(0.1)
    assert clock.pop() == 0.0, "nothing was sent"
    start = time.monotonic()
    requests.send(0)
    time.sleep(0.1)
    half = clock.pop()
    assert 0.1 <= half <= time.monotonic() - start, "three pending requests are one busy engine"
    may_answer.set()
    while complete := requests.wait():
        for index in complete:
            requests.pop(index)
    requests.close()
    rest, end = clock.pop(), time.monotonic()
    assert 0.0 <= rest <= end - start - half
    time.sleep(0.05)
    assert clock.pop() == 0.0
