"""A used-up quota is one line, and a file system without locks is warned of: the kernel itself refuses the calls."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_rlt.disk_faults import DiskError
from megatron_rlt.models.weights.hf_writer import write_folder
from megatron_rlt.store.parts import PartStore
from megatron_rlt.whole_files import write_text
from tests.data.sources import numbered_rows, prepare, write_lines
from tests.disk.mounts import in_process
from tests.disk.refusing import refuse, skip_without_filters
from tests.store.test_parts import rows, store
from tests.tiny_models import tiny_hf_model
from tools.chaos.cases import Case, cases, make_inputs
from tools.chaos.disks import PAGE
from tools.preloaded import PreloadedCommand

QUOTA = os.strerror(errno.EDQUOT)
AT_ONCE = {"write": errno.EDQUOT, "pwrite64": errno.EDQUOT}  # ext4, XFS: blocks are counted when they are written
LATER = {"fsync": errno.EDQUOT}  # NFS: the server counts them when the client flushes


@pytest.fixture(scope="module", autouse=True)
def _filters() -> None:
    skip_without_filters()


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Case:
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))
    return next(case for case in cases(inputs) if case.name == "sft-1")


def _start(case: Case, root: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    log = root.with_name(f"{root.name}.log")
    log.write_text("")
    root.mkdir(exist_ok=True)
    command = PreloadedCommand(case.arguments(root), output=log, errors=log, before=before)
    return command.wait(timeout=120), log.read_text()


def _prepare(folder: Path, source: Path) -> None:
    prepare(folder / "shards", source, rows_per_shard=400)


def _export(folder: Path, source: Path) -> None:
    write_folder(iter([("a", torch.ones(64, 64))]), source, folder / "hf", max_shard_bytes=50_000)


def _text(folder: Path, _: Path) -> None:
    write_text(folder / "run.json", "x" * 8192)


def _part(folder: Path, _: Path) -> None:
    parts: PartStore = store(folder)
    parts.begin()
    parts.write(0, rows(*(f"{number**5:x}" for number in range(3000))))


def _refused(calls: dict[str, int], action: Callable[[Path, Path], None], folder: Path, source: Path) -> str:
    refuse(calls, min_bytes=PAGE)
    try:
        action(folder, source)
    except DiskError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("calls", [AT_ONCE, LATER], ids=["at once", "later"])
@pytest.mark.parametrize("action", [_prepare, _export, _text, _part])
def test_a_used_up_quota_is_one_line_and_leaves_nothing(
    calls: dict[str, int], action: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", *numbered_rows(400))
    if action is _export:
        source = tiny_hf_model(tmp_path / "model", "qwen2", tied=False, num_layers=1, hidden_size=32, num_heads=2)
    folder = tmp_path / "there"
    folder.mkdir()
    line = in_process(_refused, calls, action, folder, source)
    assert line.startswith(str(folder)), line
    assert f"cannot be written: {QUOTA} (" in line
    assert line.endswith("bytes are free there); your quota is used up: make space or choose another folder")
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert left in ([], ["identity.json"]), left


@pytest.mark.parametrize("calls", [AT_ONCE, LATER], ids=["at once", "later"])
def test_a_command_whose_quota_is_used_up_ends_with_one_line_and_goes_on_later(
    calls: dict[str, int], sft: Case, tmp_path: Path
) -> None:
    status, printed = _start(sft, tmp_path / "root", partial(refuse, calls, min_bytes=2 * PAGE))  # not SQLite's pages
    assert status == 1, printed
    lines = [line for line in printed.splitlines() if line.startswith("megatron-rlt: error: ")]
    assert len(lines) == 1, printed
    assert str(tmp_path / "root") in lines[0]
    assert f"{QUOTA} (" in lines[0] or "gives no reason" in lines[0]
    assert "Traceback" not in printed
    assert list((tmp_path / "root").rglob(".*.tmp")) == []
    status, printed = _start(sft, tmp_path / "root")
    assert status == 0, printed
    assert "hf/model.safetensors" in sft.results(tmp_path / "root")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP], ids=["ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_warned_of_once_and_work_goes_on(number: int, sft: Case, tmp_path: Path) -> None:
    root = tmp_path / "root"
    status, printed = _start(sft, root, partial(refuse, {"flock": number}))
    assert status == 0, printed
    warned = [line for line in printed.splitlines() if "this file system has no locks" in line]
    why = os.strerror(number)
    assert len(warned) == 1, printed
    assert f"{root / 'run'}: this file system has no locks ({why}): see to it yourself" in warned[0]
    assert "hf/model.safetensors" in sft.results(root)


def test_the_filter_reaches_the_system_call_and_no_other(tmp_path: Path) -> None:
    assert in_process(_tries, tmp_path / "file") == f"{errno.ENOLCK} {errno.EDQUOT} 10"


def _tries(file: Path) -> str:
    refuse({"flock": errno.ENOLCK, "write": errno.EDQUOT}, min_bytes=100)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        lock = 0
    except OSError as error:
        lock = error.errno or 0
    try:
        os.write(descriptor, bytes(100))
        write = 0
    except OSError as error:
        write = error.errno or 0
    return f"{lock} {write} {os.write(descriptor, bytes(10))}"
