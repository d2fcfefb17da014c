"""Ends a run on SIGTERM or SIGUSR1, on all ranks at the same step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class EndRequest:
    """Records signals that request the end of the job. Create one per process, before the first step."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether any rank received a signal. Collective, so that all ranks end at the same step."""
        flag = torch.tensor([int(self._received)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
