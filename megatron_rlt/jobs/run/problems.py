"""Opens a run's data: shards made where needed, every row checked on the CPU, then the endless stream; or all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_rlt.config.sections import DataConfig
from megatron_rlt.data.loader import ProblemStream, scan_problems
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.parallel.collectives import broadcast_record
from megatron_rlt.parallel.platform import world
from megatron_rlt.types import Problem

T = TypeVar("T")


NextProblems = Callable[[int], Sequence[Problem]]
"""The next so many problems of the data."""


_NUM_FAULTS_SHOWN = 3


def open_problems(data: DataConfig, *, seed: int, work_dir: Path, check: Callable[[Problem], object]) -> ProblemStream:
    """The stream of a run's rows. Collective on the whole job; loads no model.

    Args:
        work_dir: where a JSONL file's shards are made.
        check: raises ValueError for a row that the run could not use.

    Raises:
        ValueError: rows that `check` refused, the first of them by file and name; or as `ensure_shards` does.
    """
    folder = _shards_of(data.path, work_dir)
    _refuse_unusable(data.path, folder, check)
    return ProblemStream(folder, seed=seed, shuffle_buffer_size=data.shuffle_buffer_size, num_workers=data.num_workers)


def read_problems(path: Path, *, work_dir: Path, use: Callable[[Problem], T]) -> tuple[T, ...]:
    """What `use` makes of every row of a data set that fits into memory. Collective on the whole job; loads no model.

    Args:
        path: folder of shards, or a file whose shards are made in `work_dir`.
        use: raises ValueError for a row that the run could not use.

    Raises:
        ValueError: as `open_problems`.
    """
    folder = _shards_of(path, work_dir)
    _refuse_unusable(path, folder, use)
    return tuple(use(problem) for problem in scan_problems(folder, part=0, num_parts=1))


def first_problems(path: Path, count: int, *, work_dir: Path) -> tuple[Problem, ...]:
    """The first rows of a data set, unchecked. Collective on the whole job; paths and errors as `read_problems`."""
    return tuple(islice(scan_problems(_shards_of(path, work_dir), part=0, num_parts=1), count))


def _shards_of(path: Path, work_dir: Path) -> Path:
    """The folder of shards; one rank makes it if need be."""
    folder = ensure_shards(path, work_dir) if dist.get_rank() == 0 else path
    return broadcast_record(folder, source_rank=0, group=world())


def _refuse_unusable(source: Path, folder: Path, check: Callable[[Problem], object]) -> None:
    """Raise the same error on every rank; each checks its part of the rows."""
    mine = [f"{source}: {fault}" for fault in islice(_faults(folder, check), _NUM_FAULTS_SHOWN)]
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    faults = [fault for part in everyone for fault in part]
    if faults:
        raise ValueError("\n".join(faults[:_NUM_FAULTS_SHOWN]))


def _faults(folder: Path, check: Callable[[Problem], object]) -> Iterator[str]:
    for problem in scan_problems(folder, part=dist.get_rank(), num_parts=dist.get_world_size()):
        try:
            check(problem)
        except ValueError as error:
            yield str(error)
