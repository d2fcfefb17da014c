"""Reads shards for training: an endless stream of `Problem`s, with a position that can be saved and restored.

Reading and shuffling use megatron-energon's savable loader. The order depends only on data, seed and settings: every
rank reads the same rows (as energon's rank 0 of 1), so that a resume under another TP x PP sees the same next batch.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    RepeatDataset,
    Sample,
    SavableDataLoader,
    ShuffleBufferDataset,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    reraise_exception,
    stateless,
)

from megatron_rlt.data.check import check_openable
from megatron_rlt.data.energon_index import SPLIT
from megatron_rlt.data.position import state_from_json, state_to_json
from megatron_rlt.data.shards import problem_from_json, read_manifest
from megatron_rlt.types import Problem

# What energon raises for a position that it did not save, when it is set or when the first row is read.
_OF_POSITION = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
NUM_OPEN_SHARDS = 16  # shards read in parallel when shuffling; energon's default, bounds the open files


@edataclass
class _ProblemSample(Sample):  # type: ignore[misc]  # untyped package
    problem: Problem


def _read_sample(raw: dict[str, Any]) -> _ProblemSample:
    return _ProblemSample(**basic_sample_keys(raw), problem=problem_from_json(raw["json"]))


class _ProblemEncoder(DefaultTaskEncoder):  # type: ignore[misc]  # untyped package
    decoder = None  # parts of a sample arrive as bytes
    cookers: ClassVar[list[Any]] = [Cooker(stateless(_read_sample))]


class _EpochShuffle(ShuffleBufferDataset):  # type: ignore[misc]  # untyped package
    """Energon's shuffle buffer; its saved state also records whether the buffer is draining at the end of an epoch.

    Energon 7.4.1 does not save this: a buffer restored while draining would refill from the next epoch.
    """

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_source_is_read")

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._source_is_read = False

    def __iter__(self) -> Iterator[_ProblemSample]:
        self._active_buffer.worker_start()
        if not self._source_is_read:
            for _ in self._active_buffer.append_iter():
                if self._active_buffer.len_worker() >= self.size:
                    yield self._draw()
            self._source_is_read = True
        while self._active_buffer.len_worker() > 0:
            yield self._draw()
        self._source_is_read = False

    def _draw(self) -> _ProblemSample:
        drawn: _ProblemSample = self._active_buffer.pop(self._worker_rng.randbelow(self._active_buffer.len_worker()))
        return drawn


@dataclass(frozen=True)
class _Order:
    """Everything that the reading order depends on; a saved position is valid only for the same values."""

    content_hash: str
    seed: int
    shuffle_buffer_size: int
    num_workers: int


class ProblemStream:
    """Endless rows of one data set: every epoch has each row once, in its own seeded order. Not thread-safe.

    Several workers each repeat their own part, so their epochs drift apart. Leaves the global RNGs untouched.
    """

    def __init__(self, folder: Path, *, seed: int, shuffle_buffer_size: int, num_workers: int) -> None:
        """Open a prepared folder; reads nothing before the first batch.

        `shuffle_buffer_size` 1 keeps the row order. `num_workers` 0 reads in this process; more workers interleave
        their parts of the data, so their number changes the order.
        Raises ValueError if the folder holds no complete data set, or fewer rows than workers, or if energon would act
        upon something that `prepare` did not write; the rows themselves are checked by `check_data_set`.
        """
        manifest = check_openable(folder)
        if num_workers > manifest.num_rows:
            raise ValueError(
                f"num_workers {num_workers} is more than the {manifest.num_rows} rows of {folder}: "
                f"set it to at most {manifest.num_rows}"
            )
        self.num_rows = manifest.num_rows
        self._folder = folder
        self._order = _Order(manifest.content_hash, seed, shuffle_buffer_size, num_workers)
        self._loader = _open_loader(folder, self._order)
        self._rows: Generator[_ProblemSample, None, None] | None = None
        self._is_restored = False  # and nothing was read since

    def next_batch(self, num_rows: int) -> tuple[Problem, ...]:
        """Return the next `num_rows` >= 1 problems, across epoch ends."""
        assert num_rows > 0, f"a batch of {num_rows} rows"
        try:
            if self._rows is None:
                self._rows = iter(self._loader)
            rows = self._rows
            batch = tuple(next(rows).problem for _ in range(num_rows))
        except _OF_POSITION as error:
            if not self._is_restored:
                raise
            raise self._damaged(error) from error
        self._is_restored = False
        return batch

    def state_bytes(self) -> bytes:
        """Serialize the position after the last batch, as JSON (equal positions may give different bytes)."""
        position = state_to_json(self._loader.save_state_rank())
        return json.dumps({"order": asdict(self._order), "position": position}, allow_nan=False).encode()

    def load_state_bytes(self, data: bytes) -> None:
        """Continue after a saved position.

        Raises ValueError if it belongs to another data set or other settings, or if it is no position.
        """
        try:
            state = json.loads(data)
            saved_order, position = dict(state["order"]), state_from_json(state["position"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(error) from error
        here = asdict(self._order)
        changed = {key: (saved_order.get(key), now) for key, now in here.items() if saved_order.get(key) != now}
        if changed:
            described = ", ".join(f"{key} was {saved}, is {now}" for key, (saved, now) in changed.items())
            raise ValueError(
                f"the saved data position does not fit {self._folder}: {described}; "
                "resume with the data set and settings of the first start, or start in another output_dir"
            )
        self.close()
        self._loader = _open_loader(self._folder, self._order)
        try:
            self._loader.restore_state_rank(position)
        except _OF_POSITION as error:
            raise self._damaged(error) from error
        self._is_restored = True

    def _damaged(self, error: Exception) -> ValueError:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return ValueError(f"the saved data position of {self._folder} is damaged ({what}): take an intact checkpoint")

    def close(self) -> None:
        """End the worker processes; no batch can be read afterwards."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        # torch keeps persistent workers only under this private name. The garbage collector would collect their stop
        # queue before them, and each worker would take a timeout of 5 s.
        self._loader._iterator = None


def _open_loader(folder: Path, order: _Order) -> SavableDataLoader:
    """Energon's loader over endless epochs."""
    workers = WorkerConfig(
        rank=0,
        world_size=1,
        num_workers=order.num_workers,
        seed_offset=order.seed,
        global_error_handler=reraise_exception,  # energon's default logs a bad row and drops it
    )
    shuffled = order.shuffle_buffer_size > 1
    epoch = get_train_dataset(
        folder,
        split_part=SPLIT,
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        shuffle_over_epochs_multiplier=1 if shuffled else None,
        parallel_shard_iters=NUM_OPEN_SHARDS if shuffled else 1,
        task_encoder=_ProblemEncoder(),
        repeat=False,  # repeated after shuffling, or a buffer larger than the data would mix many epochs
    )
    if shuffled:
        epoch = _EpochShuffle(epoch, size=order.shuffle_buffer_size, worker_config=workers)
    loader = get_savable_loader(
        RepeatDataset(epoch, worker_config=workers),
        gc_collect_every_n_steps=0,  # else it freezes and collects the trainer's own objects
        watchdog_timeout_seconds=None,  # the run has its own watchdog
    )
    loader.pin_memory = False  # rows are text
    # torch draws a seed per new iterator, by default from the global RNG: a resumed run would draw once more.
    loader.generator = torch.Generator().manual_seed(order.seed)
    return loader


def scan_problems(folder: Path, *, part: int, num_parts: int) -> Iterator[Problem]:
    """Read every `num_parts`-th row once, starting at row `part`. Raises ValueError as `read_manifest` does."""
    number = 0
    for shard in read_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, f"{shard.name}: {member.name} is not a file"
                if number % num_parts == part:
                    yield problem_from_json(file.read())
                number += 1
