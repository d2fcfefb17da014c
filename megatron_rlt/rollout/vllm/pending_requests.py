"""Questions that vLLM servers work on while this process does something else.

A question is a group: one prompt, several completions. Questions belong to parts, and a part is given once, when all of
its questions are answered. Everything happens on the rank that asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from megatron_rlt.rollout.vllm.client import EngineLostError, ServedChoice

Ask = Callable[[int], list[ServedChoice]]
"""The answer to the question of a number; raises EngineLostError."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One question's completions."""

    choices: list[ServedChoice]
    policy_version: int


class WorkClock:
    """Seconds in which at least one question was open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self._since = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        """A question is asked."""
        with self._lock:
            if self._num_open == 0:
                self._since = time.monotonic()
            self._num_open += 1

    def end(self) -> None:
        """A question is answered, or failed."""
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            now = time.monotonic()
            seconds, self._seconds = self._seconds, 0.0
            if self._num_open > 0:
                seconds += now - self._since
                self._since = now
            return seconds


class OpenQuestions:
    """One rollout: asked at once, answered part by part."""

    def __init__(self, ask: Ask, parts: Sequence[range], clock: WorkClock, *, max_concurrent: int) -> None:
        """
        Args:
            parts: numbers of the questions of each part; together 0, 1, 2, ...
            max_concurrent: questions asked at the same time.
        """
        self._ask, self._parts, self._clock = ask, parts, clock
        self._pool = ThreadPoolExecutor(max_concurrent)
        self._waiting: dict[Future[list[ServedChoice]], int] = {}
        self._answers: dict[int, Answer] = {}
        self._given: set[int] = set()
        self._error: EngineLostError | None = None
        self.policy_version = -1
        """Of the weights that the questions asked last are answered with."""

    def ask(self, policy_version: int) -> None:
        """Ask all that have no answer, and return at once."""
        self.policy_version, self._error = policy_version, None
        for number in (number for part in self._parts for number in part if number not in self._answers):
            self._clock.begin()
            future = self._pool.submit(self._ask, number)
            future.add_done_callback(lambda _: self._clock.end())
            self._waiting[future] = number

    def wait(self) -> list[int]:
        """Wait for a complete part that was not given; returns all that there are, none once all were given.

        Raises:
            EngineLostError: the questions still open failed. What was answered stays, and `ask` asks for the rest.
        """
        while True:
            complete = [
                index
                for index, part in enumerate(self._parts)
                if index not in self._given and all(number in self._answers for number in part)
            ]
            if complete or len(self._given) == len(self._parts):
                return complete
            if not self._waiting:
                assert self._error is not None, "a question that is neither open nor answered has failed"
                raise self._error
            self._take_answers()

    def give(self, index: int) -> list[Answer]:
        """A part's answers, in the order of its questions; it is not given again."""
        self._given.add(index)
        return [self._answers[number] for number in self._parts[index]]

    def forget(self, indices: Sequence[int]) -> None:
        """Drop the answers of parts that were not given, so that they are asked again."""
        for number in (number for index in indices for number in self._parts[index]):
            del self._answers[number]

    def close(self) -> None:
        """Wait for what is still open, and forget it."""
        self._pool.shutdown(cancel_futures=True)

    def _take_answers(self) -> None:
        for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
            number = self._waiting.pop(future)
            error = future.exception()
            if error is None:
                self._answers[number] = Answer(future.result(), self.policy_version)
            elif isinstance(error, EngineLostError):
                self._error = self._error or error
            else:
                raise error
