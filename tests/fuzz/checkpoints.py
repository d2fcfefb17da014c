"""Checkpoints with one changed file, damaged or sealed again by who changed it, as a run that resumes opens them.

On a rank of its own: loading needs a process group and Megatron's state.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlt.checkpoint.folders import find_resumable
from megatron_rlt.checkpoint.rank_state import RankState
from megatron_rlt.checkpoint.saving import capture_training_state, write_training_state
from megatron_rlt.checkpoint.training_state import SharedState
from megatron_rlt.data.loader import ProblemStream
from megatron_rlt.parallel.platform import world
from tests.checkpoint.sealing import reseal
from tests.checkpoint.tiny_training import Training, layout_of, tiny_training
from tests.data.sources import numbered_shards
from tests.fuzz.mutations import VALUES, mutated_bytes, mutated_json, mutated_value
from tests.fuzz.outcome import Attempt, Outcome, outcome_of

STEP = "step-000001"
_COUNTERS = ("skipped_in_a_row",)


def outcomes(model: Path, place: Path, count: int) -> list[tuple[str, Outcome]]:
    """What became of so many attempts; for one rank of its own."""
    shards = numbered_shards(place, 12)
    training, stream = tiny_training(model, layout_of(1, 1, 1)), _stream(shards)
    training.update()
    stream.next_batch(3)
    _save(training, stream, place / "whole")
    return [(attempt.what, outcome_of(attempt)) for attempt in islice(_attempts(training, shards, place), count)]


def _attempts(training: Training, shards: Path, place: Path) -> Iterator[Attempt]:
    random, number = Random(11), 0
    whole = place / "whole" / STEP
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    opened = partial(_open, training, shards, place)
    manifest = (whole / "manifest.json").read_bytes()
    yield Attempt("untouched", partial(opened, "manifest.json", manifest, sealed=False), must_accept=True)
    yield Attempt("sealed again", partial(opened, names[0], (whole / names[0]).read_bytes()), must_accept=True)
    for key, value in (("tp", 2**31), ("dp", 10**9), ("pp", 10**30)):
        layout = json.loads(manifest)["layout"] | {key: value}
        yield Attempt(f"{key} {value}", partial(opened, names[0], (whole / names[0]).read_bytes(), layout=layout), True)
    while True:
        number += 1
        name = random.choice(names)
        before = (whole / name).read_bytes()
        after = _mutated(whole / name, before, random)
        sealed = name != "manifest.json" and random.randrange(4) > 0
        what = f"{name}: mutation {number}{' sealed again' if sealed else ''}"
        yield Attempt(what, partial(opened, name, after, sealed=sealed), not sealed and not _is_same(before, after))


def _is_same(before: bytes, after: bytes) -> bool:
    """The same bytes, or for JSON the same values: a manifest may be written otherwise."""
    try:
        return before == after or json.loads(before) == json.loads(after)
    except ValueError:
        return False


def _mutated(file: Path, content: bytes, random: Random) -> bytes:
    if random.randrange(2):
        return mutated_bytes(content, random)
    if file.suffix == ".json":
        return mutated_json(content, random)
    if file.name == ".metadata":
        return _mutated_metadata(content, random)
    if file.suffix == ".pt":
        return _mutated_state(content, random)
    return mutated_bytes(content, random)


def _mutated_metadata(content: bytes, random: Random) -> bytes:
    """A place, a shape, a name or a type changed; it still names only what a checkpoint needs."""
    metadata = pickle.loads(content)
    index = random.choice(list(metadata.storage_data))
    place, tensor = metadata.storage_data[index], random.choice(list(metadata.state_dict_metadata.values()))
    kind = random.randrange(8)
    if kind == 0:
        del metadata.storage_data[index]
    elif kind == 1:
        del metadata.state_dict_metadata[random.choice(list(metadata.state_dict_metadata))]
    elif kind == 2:
        setattr(place, random.choice(("offset", "length", "relative_path")), random.choice(VALUES))
    elif kind == 3:
        setattr(place, random.choice(("offset", "length")), random.choice((place.offset + 1, 2**40, -5, 0)))
    elif kind == 4:
        setattr(tensor, random.choice(("size", "chunks", "properties")), random.choice(VALUES))
    elif kind == 5:
        tensor.size = torch.Size([random.choice((1, 2**40, 7)), *tensor.size[1:]])
    elif kind == 6:
        chunk = random.choice(tensor.chunks)
        setattr(chunk, random.choice(("offsets", "sizes")), torch.Size([random.choice((0, 3, 2**40))]))
    else:
        setattr(metadata, random.choice(("state_dict_metadata", "storage_data", "planner_data")), random.choice(VALUES))
    return pickle.dumps(metadata)


def _mutated_state(content: bytes, random: Random) -> bytes:
    """Plain values of common or rank state changed; of bytes that hold such a file, those of the inner one."""
    state: Any = torch.load(io.BytesIO(content), weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("rng"), bytearray) and random.randrange(2):
        inner = torch.load(io.BytesIO(bytes(state["rng"])), weights_only=True)
        state["rng"] = bytearray(_saved(mutated_value(inner, random)))
        return _saved(state)
    return _saved(mutated_value(state, random))


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _open(
    training: Training, shards: Path, place: Path, name: str, content: bytes, *, sealed: bool = True, **changes: Any
) -> None:
    """As `jobs/run/training_loop.py` resumes."""
    folder = place / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "whole", folder)
    (folder / STEP / name).write_bytes(content)
    if sealed:
        reseal(folder / STEP, **changes)
    info = find_resumable(folder, group=dist.group.WORLD)
    assert info is not None
    loaded = training.load(info)
    stream = _stream(shards)
    stream.load_state_bytes(loaded.shared.data_position)
    stream.next_batch(1)
    stream.close()
    for name in _COUNTERS:
        training.policy.skipped_in_a_row = loaded.shared.counter(name)
    if loaded.rank_state is not None:
        loaded.rank_state.restore_rng()


def _stream(shards: Path) -> ProblemStream:
    return ProblemStream(shards, seed=0, shuffle_buffer_size=4, num_workers=0)


def _save(training: Training, stream: ProblemStream, folder: Path) -> None:
    captured = capture_training_state(
        1,
        models={"policy": training.policy.model, "reference": training.reference},
        optimizer=training.policy.optimizer,
        scheduler=training.policy.scheduler,
        rank_state=RankState.capture(extra=b""),
        shared_state=SharedState(stream.state_bytes(), dict.fromkeys(_COUNTERS, 0)),
        num_updates=training.num_updates,
        reshardable="full",
        copy=False,
    )
    write_training_state(captured, folder, keep_last=1, group=world())
