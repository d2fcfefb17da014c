"""Rows, shards and the files of runs that are damaged, as `prepare`, `status` and readers of stores meet them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rlt.cli import main
from megatron_rlt.config.commands.sft import SftConfig
from megatron_rlt.data.check import check_data_set
from megatron_rlt.jobs.train.rollouts import groups_from_bytes
from megatron_rlt.metrics.writer import read_metrics
from megatron_rlt.store.explanations import read_explanations
from megatron_rlt.store.run_folder import check_run_folder, write_run_folder
from megatron_rlt.store.worst_completions import read_worst_completions
from tests.data.sources import numbered_rows, numbered_shards
from tests.fuzz.mutations import FORGING, mutated_bytes, mutated_json
from tests.fuzz.outcome import Attempt

_ROW = {"id": "a", "question": "1 + 1?", "solution": "2"}

# Files in which no row can be used. Each must be refused.
NEVER_RIGHT = (
    b"", b"\n\n", b"\xff\xfe", b"{", b"[]", b"null", b'"x"', b"[" * 5000, b"5", b'{"question": 1}', b"{}",
    b'{"question": "a", "question": "b", "solution": "c"}', b'{"question": "a", "solution": NaN}', b"1" * 6000,
    json.dumps(_ROW | {"question": "\ud800"}).encode(), json.dumps(_ROW | {"solution": "\u200b "}).encode(),
    json.dumps(_ROW | {"id": 1.5}).encode(), json.dumps(_ROW | {"id": ""}).encode(),
    json.dumps(_ROW | {"id": []}).encode(),
    json.dumps({FORGING: FORGING}).encode(), json.dumps(_ROW | {"id": "\ud800"}).encode(),
    json.dumps({"conversations": FORGING}).encode(), json.dumps({"conversations": [{"from": FORGING}]}).encode(),
    json.dumps(_ROW | {"id": [FORGING]}).encode(), json.dumps(_ROW).encode("utf-16"),
)  # fmt: skip


def rows(place: Path) -> Iterator[Attempt]:
    """Files of rows as `prepare` reads them, without end."""
    random, number = Random(7), 0
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in numbered_rows(4))
    table = place / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(4)), table)
    whole = table.read_bytes()
    yield Attempt("untouched rows", partial(_prepare, place, "jsonl", lines), must_accept=True)
    yield Attempt("untouched parquet", partial(_prepare, place, "parquet", whole), must_accept=True)
    for content in NEVER_RIGHT:
        yield Attempt(f"rows {content[:60]!r}", partial(_prepare, place, "jsonl", content), True)
        yield Attempt(f"parquet {content[:60]!r}", partial(_prepare, place, "parquet", content), True)
    for kind in (pa.int64(), pa.list_(pa.string()), pa.binary(), pa.struct([("a", pa.string())]), pa.null()):
        strange = pa.table({name: pa.nulls(3, kind) for name in _ROW})
        yield Attempt(f"parquet of {kind}", partial(_prepare_table, place, strange), True)
    yield Attempt("parquet names", partial(_prepare_table, place, pa.table({FORGING: ["a"], "\x1b": ["b"]})), True)
    while True:
        number += 1
        yield Attempt(f"rows mutation {number}", partial(_prepare, place, "jsonl", _mutated_rows(lines, random)))
        yield Attempt(f"parquet mutation {number}", partial(_prepare, place, "parquet", mutated_bytes(whole, random)))


def shards(place: Path) -> Iterator[Attempt]:
    """A folder of shards with one changed file, as a run checks it, without end. Every change is refused."""
    random, number = Random(8), 0
    folder = numbered_shards(place, 12)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "rejected.jsonl")
    manifest = (folder / "manifest.json").read_bytes()
    yield Attempt("untouched", partial(_check_shards, folder, "manifest.json", manifest), must_accept=True)
    while True:
        number += 1
        file = random.choice(files)
        content = file.read_bytes()
        is_json = file.suffix == ".json" and random.randrange(2)
        changed = mutated_json(content, random) if is_json else mutated_bytes(content, random)
        try:
            same = changed == content or (is_json and json.loads(changed) == json.loads(content))
        except ValueError:
            same = False
        name = str(file.relative_to(folder))
        yield Attempt(
            f"{name}: mutation {number}",
            partial(_check_shards, folder, name, changed),
            must_refuse=".tar" in name and not same,
        )


def papers(place: Path) -> Iterator[Attempt]:
    """The files of a run folder, as resuming and `status` read them, without end."""
    random, number = Random(9), 0
    run = place / "run"
    config = SftConfig.model_validate({"output_dir": str(run), "model": {"model": "m"}, "data": {"path": "d"}})
    write_run_folder(run, "sft", config, world_size=1)
    steps = [{"step": n, "seconds/train": 1.5, "tokens_per_second/train": 10.0, "loss/mean": 0.5} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "rollout_gap.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    record = {
        "rank": 0,
        "phase": "train",
        "kind": "error",
        "message": "m",
        "details": "",
        "seconds": 1.0,
        "num_beats": 0,
    }
    ranks = run / "attempts" / "20260101-1" / "ranks"
    ranks.mkdir(parents=True)
    for name, text in (("host-0", "node"), ("phase-0", "train"), ("failure-0.json", json.dumps(record))):
        (ranks / name).write_text(text)
    readers: tuple[Callable[[Path], object], ...] = (
        lambda folder: check_run_folder(folder, "sft", config), read_metrics, read_worst_completions, _status,
    )  # fmt: skip
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    for reader in readers:
        untouched = (run / files[0]).read_bytes()
        yield Attempt(
            f"{reader.__name__}: untouched", partial(_read, run, files[0], untouched, reader), must_accept=True
        )
    for name in files:
        for content in (b"", b"[1]", b"\xff", b"\0" * 9, FORGING.encode(), b"{}", b"null", b"5", b'{"step": "x"}\n'):
            yield Attempt(f"status with {name}: {content[:20]!r}", partial(_read, run, name, content, _status))
    while True:
        number += 1
        name = random.choice(files)
        content = (run / name).read_bytes()
        changed = mutated_json(content, random) if name.endswith(".json") else _mutated_rows(content, random)
        for reader in readers:
            yield Attempt(
                f"{reader.__name__} with {name}: mutation {number}", partial(_read, run, name, changed, reader)
            )


def stores(place: Path) -> Iterator[Attempt]:
    """Bytes of sampled groups and files of explanations, without end."""
    random, number = Random(10), 0
    table = place / "explanations.parquet"
    pq.write_table(pa.Table.from_pylist(numbered_rows(4)), table)
    whole = table.read_bytes()
    while True:
        number += 1
        content = mutated_bytes(whole, random)
        yield Attempt(f"explanations {number}", partial(_explanations, place, content), must_refuse=True)
        yield Attempt(f"groups {number}", partial(_groups, content), must_refuse=True)
        yield Attempt(f"rows of parquet {number}", partial(_prepare, place, "parquet", content))


def _mutated_rows(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    place = random.randrange(max(len(lines) - 1, 1))
    try:
        lines[place] = (
            mutated_json(lines[place], random) if random.randrange(2) else mutated_bytes(lines[place], random)
        )
    except ValueError:  # no JSON
        lines[place] = mutated_bytes(lines[place], random)
    return b"\n".join(lines)


def _prepare(place: Path, suffix: str, content: bytes) -> int:
    file = place / f"fuzzed.{suffix}"
    file.write_bytes(content)
    shutil.rmtree(place / "prepared", ignore_errors=True)
    return main(["prepare", "prepare.yaml", f"input=['{file}']", f"output_dir={place / 'prepared'}"])


def _prepare_table(place: Path, table: pa.Table) -> int:
    file = place / "table.parquet"
    pq.write_table(table, file)
    return _prepare(place, "parquet", file.read_bytes())


def _copy(folder: Path, name: str, content: bytes) -> Path:
    copy = folder.with_name(f"{folder.name}-fuzzed")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, symlinks=True)
    (copy / name).write_bytes(content)
    return copy


def _check_shards(folder: Path, name: str, content: bytes) -> None:
    check_data_set(_copy(folder, name, content))


def _read(run: Path, name: str, content: bytes, reader: Callable[[Path], object]) -> int:
    status = reader(_copy(run, name, content))
    return status if isinstance(status, int) else 0


def _status(folder: Path) -> int:
    return main(["status", str(folder)])


def _explanations(place: Path, content: bytes) -> None:
    file = place / "fuzzed.parquet"
    file.write_bytes(content)
    list(read_explanations(file, with_tokens=True))


def _groups(content: bytes) -> None:
    groups_from_bytes(content)
