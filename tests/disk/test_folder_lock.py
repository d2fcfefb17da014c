"""One start at a time: the kernel's lock, its holder's name, and nothing left of either."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.folder_lock import LockedError, locked_beside, locked_folder
from tests.ranks import forkserver


def _hold(folder: Path, queue: Any, with_child: bool) -> None:
    with locked_folder(folder):
        child = os.fork() if with_child else 0
        if with_child and child == 0:  # such as a process that reads data
            time.sleep(60)
            os._exit(0)
        queue.put((os.getpid(), child))
        time.sleep(60)


def _holder(folder: Path, *, with_child: bool = False) -> tuple[Any, int, int]:
    queue = forkserver().Queue()
    process = forkserver().Process(target=_hold, args=(folder, queue, with_child))
    process.start()
    pid, child = queue.get(timeout=60)
    return process, pid, child


def test_a_second_start_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    process, pid, _ = _holder(tmp_path / "run")
    with pytest.raises(LockedError) as caught, locked_folder(tmp_path / "run"):
        pass
    process.kill()
    process.join()
    assert str(caught.value) == (
        f"{tmp_path / 'run'} is being written by another start (host {socket.gethostname()}, pid {pid}): wait for its"
        " end, or end it"
    )


def test_a_killed_holder_holds_nothing_and_neither_does_its_child(tmp_path: Path) -> None:
    process, _, child = _holder(tmp_path / "run", with_child=True)
    process.kill()
    process.join()
    assert (tmp_path / "run" / ".lock").exists()
    os.kill(child, 0)  # it is alive
    with locked_folder(tmp_path / "run"):
        assert f"pid {os.getpid()}" in (tmp_path / "run" / ".lock").read_text()
    os.kill(child, signal.SIGKILL)


def test_a_start_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "run"):
        pass
    with locked_beside(tmp_path / "deep" / "scores.parquet"):
        assert [path.name for path in (tmp_path / "deep").iterdir()] == [".scores.parquet.lock"]
    assert list((tmp_path / "deep").iterdir()) == []
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with locked_folder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def _count(folder: Path, file: Path, times: int) -> None:
    """Read, wait, write back one more: two at once would lose a count."""
    done = 0
    while done < times:
        try:
            with locked_folder(folder):
                before = int(file.read_text())
                time.sleep(0.001)
                file.write_text(str(before + 1))
                done += 1
        except LockedError:
            continue


def test_no_two_hold_it_while_lock_files_come_and_go(tmp_path: Path) -> None:
    """A lock file is removed while others wait for it: whoever gets a removed file's lock must not take it for this."""
    file = tmp_path / "count"
    file.write_text("0")
    processes = [forkserver().Process(target=_count, args=(tmp_path / "run", file, 25)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert file.read_text() == "100"
    assert not (tmp_path / "run" / ".lock").exists()
