"""Ways that compete: each in processes of its own that stay alive, asked in turn, so that all see the same machine.

In: how a way prepares itself (a picklable callable) and the lengths of the completions of a round. Out: seconds, memory
beyond the weights and the log-probs. A way on several ranks has one process a rank; its seconds are the slowest
rank's, its memory is that of all ranks together.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter, process_time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from megatron_rlt.types import SpannedSequence
from tools.bench.machine import peak_resident_bytes, reset_peak_resident_bytes
from tools.bench.workload import completions

_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Prepared:
    """A way with its weights loaded."""

    work: Callable[[list[SpannedSequence]], Tensor]  # returns `[sum of num_targets]` log-probs in the caller's order
    weights_resident_bytes: int  # of the process, once its weights are loaded
    vocab_size: int


@dataclass(frozen=True)
class Way:
    """A contestant before its processes start."""

    name: str
    prepare: Callable[[], Prepared]  # called in each rank's process, after it joined its ranks
    num_ranks: int
    num_threads: int  # of each rank


@dataclass(frozen=True)
class Round:
    """What one pass over the completions cost."""

    seconds: float
    cpu_seconds: float  # of all threads and ranks: what is left to compare on a machine that others use
    extra_bytes: int  # peak beyond the weights, all ranks together
    logprobs: NDArray[np.float32]  # `[N]`

    @staticmethod
    def of_ranks(parts: Sequence[Round]) -> Round:
        return Round(
            seconds=max(part.seconds for part in parts),
            cpu_seconds=sum(part.cpu_seconds for part in parts),
            extra_bytes=sum(part.extra_bytes for part in parts),
            logprobs=parts[0].logprobs,
        )


@dataclass(frozen=True)
class Result:
    """All rounds of one way."""

    seconds: float  # median
    cpu_seconds: float  # median
    extra_bytes: int  # most of any round
    logprobs: NDArray[np.float32]  # `[N]`

    @staticmethod
    def of_rounds(rounds: Sequence[Round]) -> Result:
        return Result(
            seconds=statistics.median(one.seconds for one in rounds),
            cpu_seconds=statistics.median(one.cpu_seconds for one in rounds),
            extra_bytes=max(one.extra_bytes for one in rounds),
            logprobs=rounds[0].logprobs,
        )


def compete(ways: Sequence[Way], lengths: Sequence[int], *, rounds: int) -> dict[str, Result]:
    """Let every way take every round, one after the other, each round beginning with another way."""
    taken: dict[str, list[Round]] = {way.name: [] for way in ways}
    with ExitStack() as stack:
        ask = {way.name: stack.enter_context(running(way)) for way in ways}
        for name in ask:
            ask[name](lengths[:1])  # warm-up: allocations, kernels, connections
        for number in range(rounds):
            for place in range(len(ways)):
                name = ways[(number + place) % len(ways)].name
                taken[name].append(ask[name](lengths))
    return {name: Result.of_rounds(some) for name, some in taken.items()}


@contextmanager
def running(way: Way) -> Iterator[Callable[[Sequence[int]], Round]]:
    """The way's processes, as a callable from the lengths of completions to what they cost."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # libraries on optional packages, at import
    spawn = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(way.num_ranks):
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(way, rank, port, theirs), daemon=True)
        process.start()
        theirs.close()  # else a rank that dies would leave this end waiting
        pipes.append(mine)
        processes.append(process)

    def ask(lengths: Sequence[int]) -> Round:
        for pipe in pipes:
            pipe.send(tuple(lengths))
        parts = [_receive(pipe) for pipe in pipes]
        return Round.of_ranks(parts)

    try:
        yield ask
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in processes:
            process.join(timeout=60)


def _receive(pipe: Connection) -> Round:
    if not pipe.poll(_TIMEOUT_SECONDS):
        raise TimeoutError(f"a way took more than {_TIMEOUT_SECONDS:.0f} s for one round")
    received: Round = pipe.recv()  # EOFError: the rank died; its traceback stands above
    return received


def _serve(way: Way, rank: int, port: int, pipe: Connection) -> None:
    """One rank's process: answers lengths with costs until it receives None."""
    torch.set_num_threads(way.num_threads)
    places = {"RANK": rank, "WORLD_SIZE": way.num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    start_distributed(timeout_seconds=_TIMEOUT_SECONDS)
    prepared = way.prepare()
    while (lengths := pipe.recv()) is not None:
        sequences = completions(lengths, vocab_size=prepared.vocab_size)
        reset_peak_resident_bytes()
        start, cpu_start = perf_counter(), process_time()
        logprobs = prepared.work(sequences)
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
        extra = peak_resident_bytes() - prepared.weights_resident_bytes
        pipe.send(Round(seconds, cpu_seconds, extra, logprobs.float().numpy()))
    stop_distributed()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
