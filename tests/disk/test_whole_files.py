"""Files are there whole or not at all; what a disk refuses is one line; leftovers of kills are found by their names."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path

import pytest

from megatron_rlt.disk_faults import DiskError
from megatron_rlt.whole_files import (
    _TEMPORARY,
    discard,
    flush_to_disk,
    make_folder,
    replacing,
    sweep,
    sweep_beside,
    temporary_beside,
    write_bytes,
    write_text,
)
from tests.disk.mounts import as_nobody, in_process, read_only, small_disk


def _one_line(caught: pytest.ExceptionInfo[DiskError], *words: object) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(TypeError), replacing(file) as stream:
        stream.writelines([b"new", "no bytes"])  # type: ignore[list-item]
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """With one temporary name the second would write into the first's file."""
    file = tmp_path / "part-000000.parquet"
    with replacing(file) as first, replacing(file) as second:
        first.write(b"first" * 1000)
        second.write(b"second")
        first.write(b"first" * 1000)
    assert file.read_bytes() == b"first" * 2000
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_full_disk_is_one_line_with_path_reason_and_free_bytes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 65_536) as disk:
        file = disk / "a.bin"
        write_bytes(file, b"old")
        with pytest.raises(DiskError) as caught:
            write_bytes(file, bytes(100_000))
        _one_line(caught, file, os.strerror(errno.ENOSPC), "bytes are free there", "make space")
        assert file.read_bytes() == b"old"
        assert [path.name for path in disk.iterdir()] == ["a.bin"], "what was written stays and keeps the disk full"


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path) -> None:
    answer = in_process(_write_above_the_limit, tmp_path / "a.bin")
    assert answer.startswith(f"DiskError: {tmp_path / 'a.bin'} cannot be written: {os.strerror(errno.EFBIG)} (")
    assert "ulimit -f" in answer
    assert list(tmp_path.iterdir()) == []


def _write_above_the_limit(file: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    write_bytes(file, bytes(100_000))


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with read_only(tmp_path) as folder:
        for action in (lambda: write_text(folder / "a", ""), lambda: make_folder(folder / "b" / "c")):
            with pytest.raises(DiskError) as caught:
                action()
            _one_line(caught, folder, os.strerror(errno.EROFS), "bytes are free there", "not mounted read-only")


def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    answer = in_process(_write_as_nobody, tmp_path / "a.txt")
    assert answer.startswith(f"DiskError: {tmp_path / 'a.txt'} cannot be written: {os.strerror(errno.EACCES)} (")
    assert "give yourself the right" in answer


def _write_as_nobody(file: Path) -> None:
    as_nobody()
    write_text(file, "")


def test_a_name_that_is_too_long_is_one_line_and_the_longest_is_written(tmp_path: Path) -> None:
    longest = tmp_path / ("é" * 127)  # 254 bytes of 255
    write_text(longest, "x")
    assert longest.read_text() == "x"
    with pytest.raises(DiskError) as caught:
        write_text(tmp_path / ("a" * 256), "x")
    _one_line(caught, os.strerror(errno.ENAMETOOLONG), "choose a shorter name")
    assert [path.name for path in tmp_path.iterdir()] == [longest.name]


def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "gone")
    for action in (lambda: make_folder(link), lambda: make_folder(link / "b"), lambda: write_text(link / "a", "")):
        with pytest.raises(DiskError) as caught:
            action()
        _one_line(caught, f"{link} is a link to {tmp_path / 'gone'}, which does not exist")


def test_a_file_system_that_cannot_flush_folders_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel's own /proc is one."""
    with caplog.at_level(logging.WARNING):
        flush_to_disk(Path("/proc"))
        flush_to_disk(Path("/proc/self"))
    (record,) = caplog.records
    assert "/proc: this file system cannot flush folders (Invalid argument)" in record.getMessage()


def test_a_file_and_its_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_text(tmp_path / "run.json", "{}")
    assert flushed == [(tmp_path / "run.json").stat().st_ino, tmp_path.stat().st_ino]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = [run / "config.yaml", run / ".hidden.tmp", run / "scored" / ".rlt-0000.tmp", run / "a.rlt-01234567.tmp"]
    for file in (*kept, temporary_beside(run / "run.json"), temporary_beside(run / "scored" / "parts" / "part-0")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    (temporary_beside(run / "hf") / "deep").mkdir(parents=True)
    sweep(run)
    assert sorted(path for path in run.rglob("*") if path.is_file()) == sorted(kept)
    assert not any(_TEMPORARY.fullmatch(path.name) for path in run.rglob("*"))

    others = temporary_beside(tmp_path / "scores.parquet")
    others.write_text("x")
    temporary_beside(tmp_path / "run").mkdir()
    sweep_beside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", others.name])


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("x")
    answer = in_process(_killed_while_removing, folder)
    assert answer == "killed"
    assert not folder.exists()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _killed_while_removing(folder: Path) -> str:
    """As if SIGKILL came between two files."""

    class Killed(BaseException):
        pass

    unlink, count = os.unlink, [0]

    def second_kills(*args: object, **options: object) -> None:
        count[0] += 1
        if count[0] == 2:
            raise Killed
        unlink(*args, **options)  # type: ignore[arg-type]

    os.unlink = second_kills  # type: ignore[assignment]
    try:
        discard(folder)
    except Killed:
        return "killed"
    return "removed"
