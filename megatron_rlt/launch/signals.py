"""Notes the signals that the launcher receives, for its loop to act on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""For the job, which saves and ends."""
_ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ReceivedSignals:
    """Context manager that collects signals; the handlers of before are restored at its end."""

    def __init__(self) -> None:
        self.forwarded: list[int] = []
        """Those meant for the job, in order."""
        self.ending: int | None = None
        """The first that ends the command at once."""

    def __enter__(self) -> ReceivedSignals:
        # Ignored signals stay ignored: a run under nohup survives the end of its terminal.
        handled = [*FORWARDED, *(one for one in _ENDING if signal.getsignal(one) != signal.SIG_IGN)]
        self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in FORWARDED:
            self.forwarded.append(number)
        elif self.ending is None:
            self.ending = number
