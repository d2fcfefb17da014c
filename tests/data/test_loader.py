"""`ProblemStream`: the order is a function of data, seed and settings; a saved position is exact."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from megatron_rlt.data.loader import ProblemStream
from megatron_rlt.data.position import state_from_json, state_to_json
from megatron_rlt.data.prepare import ensure_shards
from tests.data.sources import numbered_rows, numbered_shards, prepare, write_lines
from tests.ranks import run_ranks

NUM_ROWS = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows in shards of 5: uneven on purpose."""
    return numbered_shards(tmp_path_factory.mktemp("loader"), NUM_ROWS, rows_per_shard=5)


class OpenStream(Protocol):
    def __call__(
        self, folder: Path, *, seed: int = 1, shuffle_buffer_size: int = 8, num_workers: int = 0
    ) -> ProblemStream: ...


@pytest.fixture
def opened() -> Iterator[OpenStream]:
    """Opens streams and ends their workers after the test."""
    streams = []

    def open_stream(
        folder: Path, *, seed: int = 1, shuffle_buffer_size: int = 8, num_workers: int = 0
    ) -> ProblemStream:
        stream = ProblemStream(folder, seed=seed, shuffle_buffer_size=shuffle_buffer_size, num_workers=num_workers)
        streams.append(stream)
        return stream

    yield open_stream
    for stream in streams:
        stream.close()


def ids(stream: ProblemStream, num_rows: int) -> list[str]:
    return [problem.problem_id for problem in stream.next_batch(num_rows)]


ALL_IDS = [f"p{i}" for i in range(NUM_ROWS)]


def test_a_buffer_of_one_reads_rows_in_order_epoch_after_epoch(opened: OpenStream, folder: Path) -> None:
    stream = opened(folder, shuffle_buffer_size=1)
    assert stream.num_rows == NUM_ROWS
    assert ids(stream, NUM_ROWS + 4) == [*ALL_IDS, "p0", "p1", "p2", "p3"]
    assert stream.next_batch(1)[0].solution == "5"


@pytest.mark.parametrize("shuffle_buffer_size", [2, 8, 4096])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(
    opened: OpenStream, folder: Path, shuffle_buffer_size: int
) -> None:
    stream = opened(folder, shuffle_buffer_size=shuffle_buffer_size)
    epochs = [ids(stream, NUM_ROWS) for _ in range(3)]
    assert all(sorted(epoch) == sorted(ALL_IDS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, ALL_IDS]}) == 4


def test_the_seed_decides_the_order_and_the_worker_process_does_not(opened: OpenStream, folder: Path) -> None:
    order = ids(opened(folder), 2 * NUM_ROWS)
    torch.manual_seed(5)
    assert ids(opened(folder), 2 * NUM_ROWS) == order
    assert ids(opened(folder, num_workers=1), 2 * NUM_ROWS) == order
    assert ids(opened(folder, seed=2), 2 * NUM_ROWS) != order


def _read_on_rank(source: str, work_dir: str) -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank()
    torch.manual_seed(rank)
    found = [str(ensure_shards(Path(source), Path(work_dir))) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return ids(ProblemStream(Path(str(found[0])), seed=1, shuffle_buffer_size=8, num_workers=0), 2 * NUM_ROWS)


def test_fresh_processes_of_a_group_read_the_same_rows(opened: OpenStream, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *numbered_rows(NUM_ROWS))
    here = ids(opened(ensure_shards(source, tmp_path / "here")), 2 * NUM_ROWS)
    assert run_ranks(_read_on_rank, 2, str(source), str(tmp_path / "run")) == [here, here]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("shuffle_buffer_size", [1, 8, 4096])
def test_a_restored_position_continues_with_the_same_rows(
    opened: OpenStream, folder: Path, num_workers: int, shuffle_buffer_size: int
) -> None:
    """Before the first row, in mid-epoch, while the buffer runs empty, at the epoch's end, in the second epoch."""
    stream = opened(folder, num_workers=num_workers, shuffle_buffer_size=shuffle_buffer_size)
    states = {0: stream.state_bytes()}
    order: list[str] = []
    for position in (6, 20, 23, 30):
        order += ids(stream, position - len(order))
        states[position] = stream.state_bytes()
    order += ids(stream, 40)
    for position, state in states.items():
        restored = opened(folder, num_workers=num_workers, shuffle_buffer_size=shuffle_buffer_size)
        restored.load_state_bytes(state)
        assert ids(restored, 70 - position) == order[position:], position


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_position_survives_being_saved_again_before_reading(
    opened: OpenStream, folder: Path, num_workers: int
) -> None:
    stream = opened(folder, num_workers=num_workers)
    stream.next_batch(27)
    second = opened(folder, num_workers=num_workers)
    second.load_state_bytes(stream.state_bytes())
    third = opened(folder, num_workers=num_workers)
    third.load_state_bytes(second.state_bytes())
    expected = ids(stream, 30)
    assert ids(second, 30) == expected
    assert ids(third, 30) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer_size", [1, 8])
def test_a_position_is_json_and_loses_nothing(
    opened: OpenStream, folder: Path, num_workers: int, shuffle_buffer_size: int
) -> None:
    """The tree that is read back equals energon's own, class by class and bit by bit."""
    stream = opened(folder, num_workers=num_workers, shuffle_buffer_size=shuffle_buffer_size)
    stream.next_batch(27)
    state = stream._loader.save_state_rank()
    again = state_from_json(json.loads(json.dumps(state_to_json(state), allow_nan=False)))
    assert _comparable(again) == _comparable(state)
    assert set(json.loads(stream.state_bytes())) == {"order", "position"}


def _comparable(value: Any) -> Any:
    """Types and values of a tree."""
    if isinstance(value, dict):
        return type(value).__name__, [(key, _comparable(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [_comparable(item) for item in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value).__name__, str(value.dtype), value.tolist()
    if dataclasses.is_dataclass(value):
        named = [(field.name, _comparable(getattr(value, field.name))) for field in dataclasses.fields(value)]
        return type(value).__name__, named
    return repr(value)


def test_a_stream_in_use_can_be_set_back(opened: OpenStream, folder: Path) -> None:
    stream = opened(folder, num_workers=1)
    stream.next_batch(5)
    state = stream.state_bytes()
    expected = ids(stream, 10)
    stream.load_state_bytes(state)
    assert ids(stream, 10) == expected


def test_reading_leaves_global_random_generators_alone(opened: OpenStream, folder: Path) -> None:
    before = (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()))
    stream = opened(folder)
    stream.next_batch(2 * NUM_ROWS)
    stream.load_state_bytes(stream.state_bytes())
    stream.next_batch(3)
    assert (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())) == before


def test_a_position_of_another_order_is_refused(opened: OpenStream, folder: Path, tmp_path: Path) -> None:
    state = opened(folder).state_bytes()
    for settings, told in [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"shuffle_buffer_size": 4}, "shuffle_buffer_size was 8, is 4"),
        ({"num_workers": 2}, "num_workers was 0, is 2"),
    ]:
        with pytest.raises(ValueError, match=told):
            opened(folder, **settings).load_state_bytes(state)
    other = numbered_shards(tmp_path, NUM_ROWS + 1)
    with pytest.raises(ValueError, match=r"position does not fit .*content_hash was"):
        opened(other).load_state_bytes(state)


def test_a_damaged_folder_is_refused(opened: OpenStream, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prepared data set"):
        opened(tmp_path)
    folder = numbered_shards(tmp_path, 12)
    with pytest.raises(ValueError, match="num_workers 13 is more than the 12 rows"):
        opened(folder, num_workers=13)
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"shard-000001.tar has {len(whole) - 1} bytes, {len(whole)} were written"):
        opened(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing"):
        opened(folder)
    (folder / "manifest.json").write_text('{"num_rows": 3}')
    with pytest.raises(ValueError, match="is no manifest of a prepared data set"):
        opened(folder)


def test_a_row_that_turned_bad_stops_the_run(opened: OpenStream, tmp_path: Path) -> None:
    """Energon's default would log it and go on without the row."""
    folder = prepare(tmp_path / "out", write_lines(tmp_path / "a.jsonl", *numbered_rows(3))).output_dir
    shard = folder / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'{"id": "p1"', b'["id": "p1"'))
    with pytest.raises(ValueError, match="delimiter"):
        opened(folder).next_batch(3)
