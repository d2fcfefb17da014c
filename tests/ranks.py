"""Runs a test's function on several gloo ranks, each a real process, and returns what every rank returned.

A fork server that has imported the whole package once makes a rank start in a tenth of a second. Functions and
arguments must be picklable: define functions at module level.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

from tools.preloaded import forkserver

_TIMEOUT_SECONDS = 240.0
_context = forkserver()


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = _TIMEOUT_SECONDS
) -> list[Any]:
    """Call `function(*args)` on every rank of one process group; a failing rank's traceback fails the test."""
    port = _free_port()
    queue = _context.Queue()
    processes = [
        _context.Process(target=_run_rank, args=(rank, world_size, port, queue, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    try:
        while len(results) < world_size:
            rank, failure, result = _next(queue, deadline, processes)
            assert failure is None, f"rank {rank} failed:\n{failure}"
            results[rank] = pickle.loads(result)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    for process in processes:
        process.join(timeout=30)
    return [results[rank] for rank in range(world_size)]


def _next(queue: Any, deadline: float, processes: list[Any]) -> tuple[int, str | None, Any]:
    while True:
        try:
            return queue.get(timeout=1.0)
        except Empty:
            died = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
            assert not died, f"ranks {died} died without a traceback"
            assert time.monotonic() < deadline, "no result in time"


def _run_rank(rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    from megatron_rlt.parallel.platform import start_distributed, stop_distributed

    torch.set_num_threads(1)
    try:
        start_distributed(timeout_seconds=120)
        result = function(*args)
        stop_distributed()
        # Plain pickle: the queue's own would share tensors through a process that is about to end.
        queue.put((rank, None, pickle.dumps(result)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        queue.close()
        queue.join_thread()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
