"""A data set is data: a folder of shards names no function, a row is text, whatever stands in it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from megatron.energon import WorkerConfig, get_train_dataset

from megatron_rlt.config.commands.prepare import ColumnConfig
from megatron_rlt.data.check import check_data_set
from megatron_rlt.data.energon_index import write_energon_index
from megatron_rlt.data.loader import ProblemStream
from megatron_rlt.data.prepare import ensure_shards
from megatron_rlt.data.rows import SourceRow, read_rows
from megatron_rlt.data.shards import Shard, content_hash, read_manifest, write_manifest
from megatron_rlt.prompts.tokenizer import load_tokenizer
from megatron_rlt.rewards.verifiable import VerifiableKind, Verifier
from megatron_rlt.store.explanations import read_explanations
from megatron_rlt.types import Problem
from tests.data.sources import numbered_shards
from tests.tiny_tokenizers import tiny_tokenizer
from tests.trust.payload import Payload


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    return Payload(tmp_path / "marker")


def _argument(folder: Path, payload: Payload) -> None:
    """What a downloaded data set did, and nobody saw it: energon calls what an argument names, and goes on."""
    call = {"__module__": "os", "__function__": "mkdir", "path": str(payload.marker)}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {"a": call}}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))


def _function(folder: Path, payload: Payload) -> None:
    """Any function that takes any arguments does."""
    call = {"__module__": "os", "__function__": "mkdir", "path": str(payload.marker)}
    dataset = {"__module__": "unittest.mock", "__function__": "Mock", "x": call}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))


def _loader(folder: Path, payload: Payload) -> None:
    """Energon imports a sample loader beside the index."""
    (folder / ".nv-meta" / "sample_loader.py").write_text(payload.python)
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: Webdataset\nsample_loader: sample_loader.py:sample_loader\n"
        "part_filter: sample_loader.py:part_filter\n"
    )


def _tag_in(name: str) -> Callable[[Path, Payload], None]:
    def craft(folder: Path, payload: Payload) -> None:
        (folder / ".nv-meta" / name).write_text(payload.yaml)

    return craft


def _pickle_in(name: str) -> Callable[[Path, Payload], None]:
    def craft(folder: Path, payload: Payload) -> None:
        (folder / name).write_bytes(payload.pickled)

    return craft


CRAFTED = {
    "argument": _argument,
    "function": _function,
    "sample loader": _loader,
    "split": _tag_in("split.yaml"),
    "info": _tag_in(".info.json"),
    "uuid": _tag_in("index.uuid"),
    "another file": _pickle_in(".nv-meta/more.pickle"),
    "manifest": _pickle_in("manifest.json"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_folder_that_energon_would_act_upon_is_refused(tmp_path: Path, payload: Payload, name: str) -> None:
    folder = numbered_shards(tmp_path, 12)
    CRAFTED[name](folder, payload)
    for opener in (
        lambda: ProblemStream(folder, seed=1, shuffle_buffer_size=4, num_workers=0).next_batch(3),
        lambda: ensure_shards(folder, tmp_path / "work"),
    ):
        with pytest.raises(ValueError, match="prepare") as caught:
            opener()
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not payload.has_run


@pytest.mark.parametrize("name", ["index.sqlite", "shard-000001.tar.idx"])
def test_an_index_of_other_shards_is_refused(tmp_path: Path, payload: Payload, name: str) -> None:
    folder = numbered_shards(tmp_path, 12)
    file = next(folder.rglob(name))
    content = bytearray(file.read_bytes())
    content[8] ^= 1
    for changed in (bytes(content), payload.pickled):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} must be as this version of `megatron-rlt prepare` writes it"):
            check_data_set(folder)
    assert not payload.has_run


def test_the_untouched_folder_is_accepted_also_where_it_was_copied(tmp_path: Path) -> None:
    folder = shutil.copytree(numbered_shards(tmp_path, 12), tmp_path / "copy")
    assert check_data_set(folder).num_rows == 12
    assert len(ProblemStream(folder, seed=1, shuffle_buffer_size=4, num_workers=0).next_batch(12)) == 12


def _reseal(folder: Path, content: bytes) -> None:
    """One shard of other bytes, with the manifest and the index that `prepare` would write for it."""
    shutil.rmtree(folder / ".nv-meta")
    shard, held = folder / "shard-000000.tar", read_manifest(folder)
    shard.write_bytes(content)
    record = Shard(name=shard.name, num_rows=1, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    changes = {"shards": (record,), "num_rows": 1, "content_hash": content_hash([record])}
    manifest = held.model_copy(update=changes)
    write_energon_index(folder, {shard.name: 1}, content_hash=manifest.content_hash)
    write_manifest(folder, manifest)


@pytest.mark.parametrize("suffix", ["pickle", "pyd", "pth", "npy", "py"])
def test_a_part_of_a_row_that_webdataset_would_unpickle_stays_bytes(
    tmp_path: Path, payload: Payload, suffix: str
) -> None:
    folder = numbered_shards(tmp_path, 1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        parts = {"json": b'{"id": "a", "question": "q", "solution": "s"}', suffix: payload.pickled}
        for name, data in parts.items():
            member = tarfile.TarInfo(f"000000000.{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _reseal(folder, buffer.getvalue())
    stream = ProblemStream(folder, seed=1, shuffle_buffer_size=1, num_workers=0)
    assert stream.next_batch(1)[0].problem_id == "a"
    assert not payload.has_run


def test_a_pickled_position_is_refused(tmp_path: Path, payload: Payload) -> None:
    stream = ProblemStream(numbered_shards(tmp_path, 12), seed=1, shuffle_buffer_size=4, num_workers=0)
    named = json.loads(stream.state_bytes()) | {"position": {"os.mkdir": {"path": str(payload.marker)}}}
    for content in (payload.pickled, payload.saved_by_torch, json.dumps(named).encode(), b"", b"[]", b"{}"):
        with pytest.raises(ValueError, match=r"the saved data position of .* is damaged"):
            stream.load_state_bytes(content)
    assert not payload.has_run


def _extension_table(payload: Payload) -> pa.Table:
    """A column of the type that pyarrow once unpickled, in a file that has all columns of rows."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": payload.pickled,
    }
    field = pa.field("question", pa.string(), metadata=metadata)
    return pa.table([pa.array(["q"]), pa.array(["s"])], schema=pa.schema([field, ("solution", pa.string())]))


def test_a_parquet_file_with_a_pickled_type_gives_its_values(tmp_path: Path, payload: Payload) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(_extension_table(payload), file)
    rows = list(read_rows(str(file), ColumnConfig()))
    assert [row.values for row in rows if isinstance(row, SourceRow)] == [{"question": "q", "solution": "s"}]
    with pytest.raises(ValueError, match="was not written by"):
        list(read_explanations(file, with_tokens=True))
    file.write_bytes(payload.pickled)
    for reader in (
        lambda: list(read_rows(str(file), ColumnConfig())),
        lambda: list(read_explanations(file, with_tokens=True)),
    ):
        with pytest.raises(ValueError, match="Parquet file"):
            reader()
    assert not payload.has_run


def test_a_template_in_a_row_is_text(tmp_path: Path, payload: Payload) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path / "tokenizer"))
    rendered = tokenizer.render(payload.template, payload.template, answer=payload.template)
    assert rendered.count(payload.template) == 3
    assert not payload.has_run


@pytest.mark.parametrize("kind", ["math", "countdown", "exact", "choice"])
def test_an_answer_that_is_a_program_is_compared_and_not_computed(payload: Payload, kind: VerifiableKind) -> None:
    """Answers reach a library that reads expressions."""
    texts = (payload.python, f"\\boxed{{{payload.python}}}", f"${payload.python}$", f"answer: {payload.python}")
    references = {"math": "4", "countdown": "Use 2 and 2 to make 4", "exact": "4", "choice": "A"}
    verifier = Verifier(kind, tags=None, timeout_seconds=5.0)
    for text in texts:
        for reference in (references[kind], text):
            problem = Problem("p", "q", reference)
            try:
                verifier.check(problem)
            except ValueError:
                continue
            verifier.verdict(problem, text)
    verifier.close()
    assert not payload.has_run


@pytest.mark.parametrize("craft", [_argument, _function])
def test_energon_runs_what_it_is_given(
    tmp_path: Path, payload: Payload, craft: Callable[[Path, Payload], None]
) -> None:
    """Without the check it does: these folders are real attacks."""
    folder = numbered_shards(tmp_path, 12)
    craft(folder, payload)
    with suppress(TypeError, AssertionError):  # later, when it looks at what came back
        get_train_dataset(
            folder,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
        )
    assert payload.has_run
