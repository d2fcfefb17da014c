"""Requests that vLLM servers work on meanwhile; a part is popped once, when all of its requests are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from megatron_rlt.rollout.vllm.client import EngineLostError, ServerCompletion

Send = Callable[[int], list[ServerCompletion]]
"""Sends the request of a number and returns its answer; raises EngineLostError."""


@dataclass(frozen=True, eq=False)
class Answer:
    """The completions of one request."""

    completions: list[ServerCompletion]
    policy_version: int


class BusyClock:
    """Seconds in which at least one request was pending."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_pending = 0
        self._since = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        """A request is sent."""
        with self._lock:
            if self._num_pending == 0:
                self._since = time.monotonic()
            self._num_pending += 1

    def end(self) -> None:
        """A request is answered, or failed."""
        with self._lock:
            self._num_pending -= 1
            if self._num_pending == 0:
                self._seconds += time.monotonic() - self._since

    def pop(self) -> float:
        """Busy seconds since the previous call; resets them."""
        with self._lock:
            now = time.monotonic()
            seconds, self._seconds = self._seconds, 0.0
            if self._num_pending > 0:
                seconds += now - self._since
                self._since = now
            return seconds


class PendingRequests:
    """The requests of one rollout: sent at once, popped part by part."""

    def __init__(self, send: Send, parts: Sequence[range], clock: BusyClock, *, max_concurrent: int) -> None:
        """
        Args:
            parts: numbers of the requests of each part; together 0, 1, 2, ...
            max_concurrent: requests that are pending at the same time.
        """
        self._send, self._parts, self._clock = send, parts, clock
        self._pool = ThreadPoolExecutor(max_concurrent)
        self._pending: dict[Future[list[ServerCompletion]], int] = {}
        self._answers: dict[int, Answer] = {}
        self._popped: set[int] = set()
        self._error: EngineLostError | None = None
        self.policy_version = -1
        """Version of the weights that answer the requests sent last."""

    def send(self, policy_version: int) -> None:
        """Send all requests that have no answer, and return at once."""
        self.policy_version, self._error = policy_version, None
        for number in (number for part in self._parts for number in part if number not in self._answers):
            self._clock.begin()
            future = self._pool.submit(self._send, number)
            future.add_done_callback(lambda _: self._clock.end())
            self._pending[future] = number

    def wait(self) -> list[int]:
        """Wait for a complete part that was not popped; returns all that there are, none once all were popped.

        Raises:
            EngineLostError: the pending requests failed. Answers are kept, and `send` sends the rest again.
        """
        while True:
            complete = [
                index
                for index, part in enumerate(self._parts)
                if index not in self._popped and all(number in self._answers for number in part)
            ]
            if complete or len(self._popped) == len(self._parts):
                return complete
            if not self._pending:
                assert self._error is not None, "a request that is neither pending nor answered has failed"
                raise self._error
            self._collect_answers()

    def pop(self, index: int) -> list[Answer]:
        """A part's answers, in the order of its requests."""
        self._popped.add(index)
        return [self._answers[number] for number in self._parts[index]]

    def discard(self, indices: Sequence[int]) -> None:
        """Drop the answers of parts that were not popped, so that their requests are sent again."""
        for number in (number for index in indices for number in self._parts[index]):
            del self._answers[number]

    def close(self) -> None:
        """Wait for pending requests and drop their answers."""
        self._pool.shutdown(cancel_futures=True)

    def _collect_answers(self) -> None:
        for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
            number = self._pending.pop(future)
            error = future.exception()
            if error is None:
                self._answers[number] = Answer(future.result(), self.policy_version)
            elif isinstance(error, EngineLostError):
                self._error = self._error or error
            else:
                raise error
