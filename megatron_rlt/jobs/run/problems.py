"""Opens a run's data: makes shards if needed, checks every row on the CPU, returns an endless stream or all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_rlt.config.training import DataConfig
from megatron_rlt.data.loader import ProblemStream, scan_problems
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.given_files import FaultsError
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.types import Problem

T = TypeVar("T")
NextProblems = Callable[[int], Sequence[Problem]]
"""Returns the given number of next problems."""

_NUM_FAULTS_SHOWN = 3


def open_problems(data: DataConfig, *, seed: int, work_dir: Path, check: Callable[[Problem], object]) -> ProblemStream:
    """Open the stream of a run's rows; a file's shards are made in `work_dir`. Collective; loads no model.

    Raises ValueError naming the first rows for which `check` raises ValueError, or as `ensure_shards` does.
    """
    folder = open_shards(data.path, work_dir)
    _refuse_unusable(data.path, folder, check)
    return ProblemStream(folder, seed=seed, shuffle_buffer_size=data.shuffle_buffer_size, num_workers=data.num_workers)


def read_problems(path: Path, *, work_dir: Path, use: Callable[[Problem], T]) -> tuple[T, ...]:
    """Apply `use` to every row of a folder of shards or a file. Collective; raises ValueError as `open_problems`."""
    folder = open_shards(path, work_dir)
    _refuse_unusable(path, folder, use)
    return tuple(use(problem) for problem in scan_problems(folder, part=0, num_parts=1))


def first_problems(path: Path, count: int, *, work_dir: Path) -> tuple[Problem, ...]:
    """Return the first `count` rows, unchecked. Collective; raises ValueError as `ensure_shards` does."""
    return tuple(islice(scan_problems(open_shards(path, work_dir), part=0, num_parts=1), count))


def open_shards(path: Path, work_dir: Path) -> Path:
    """Run `ensure_shards` on one rank. Collective; returns the folder on every rank."""
    folder = ensure_shards(path, work_dir) if dist.get_rank() == 0 else path
    return broadcast_record(folder, source_rank=0, group=world())


def _refuse_unusable(source: Path, folder: Path, check: Callable[[Problem], object]) -> None:
    """Check all rows, divided among the ranks; raises the same ValueError on every rank."""
    mine = [f"{source}: {fault}" for fault in islice(_faults(folder, check), _NUM_FAULTS_SHOWN)]
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    faults = [fault for part in everyone for fault in part]
    if faults:
        raise FaultsError(faults[:_NUM_FAULTS_SHOWN])


def _faults(folder: Path, check: Callable[[Problem], object]) -> Iterator[str]:
    for problem in scan_problems(folder, part=dist.get_rank(), num_parts=dist.get_world_size()):
        try:
            check(problem)
        except ValueError as error:
            yield str(error)
