"""The command as users and clusters start it: twice on one folder, and on a disk that is too small."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_rlt.metrics.writer import read_metrics
from tests.disk.mounts import small_disk
from tests.distributed.commands import Command
from tests.distributed.tiny_runs import RL_CONFIG, SMALL_RL, SMALL_SFT, WARMUP_CONFIG, TinyInputs
from tools.chaos.disks import resize

_SAVES = ("checkpoint.interval_steps=1",)


def _sft(inputs: TinyInputs, folder: Path, *more: str) -> Command:
    rows = inputs.model.parent / "train.jsonl"  # sharded inside the run folder
    settings = [f"model.model={inputs.model}", f"data.path={rows}", *SMALL_SFT, *more]
    return Command("sft", WARMUP_CONFIG, settings, folder)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_a_second_start_on_a_run_folder_is_refused_and_the_first_loses_nothing(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = Command("train", RL_CONFIG, [*SMALL_RL, *inputs.for_train], folder)
    _wait_for(folder / "config.yaml")  # behind the lock
    os.killpg(first._process.pid, signal.SIGSTOP)  # or it might end before the second has begun
    second = Command("train", RL_CONFIG, [*SMALL_RL, *inputs.for_train], folder).finish()
    os.killpg(first._process.pid, signal.SIGCONT)
    assert second.status == 2
    lines = [line for line in second.errors.splitlines() if line.startswith("megatron-rlt: error: ")]
    assert len(lines) == 1, second.errors
    assert re.search(rf"{folder} is being written by another start \(host {socket.gethostname()}, pid \d+\)", lines[0])
    assert "Traceback" not in second.errors
    attempt = first.finish()
    assert attempt.status == 0, attempt.errors
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    for number in range(1, 7):
        assert pq.read_table(folder / "completions" / f"step-{number:06d}.parquet").num_rows == 8
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(("pages", "background"), [(8, False), (200, True), (420, False), (420, True)])
def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_space(
    inputs: TinyInputs, tmp_path: Path, pages: int, background: bool
) -> None:
    settings = [*_SAVES, f"checkpoint.background={background}"]
    with small_disk(tmp_path / "disk", pages * 4096) as disk:
        full = _sft(inputs, disk / "run", *settings).finish()
        assert full.status == 1, full.errors
        lines = [line for line in full.errors.splitlines() if line.startswith("megatron-rlt: error: ")]
        assert len(lines) == 1, full.errors
        assert str(disk / "run") in lines[0]
        assert f"{os.strerror(28)} (" in lines[0] or "gives no reason" in lines[0]
        assert "bytes are free there" in lines[0]
        assert "Traceback" not in full.errors
        assert not list((disk / "run").rglob(".*.tmp"))
        resize(disk, 256 * 2**20)
        done = _sft(inputs, disk / "run", *settings).finish()
        assert done.status == 0, done.errors
        assert [record["step"] for record in read_metrics(disk / "run")] == [1, 2, 3, 4]
        assert (disk / "run" / "hf" / "model.safetensors").is_file()
