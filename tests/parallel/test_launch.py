"""Real ranks, started as a user starts them: how each way of failing ends, what is printed, and how fast."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# "Within seconds", on a machine that runs other tests; the elastic agent alone takes 30.
_PEERS_MAY_LIVE_SECONDS = 15.0
_NEVER = 600.0


def _start(
    job: str, folder: Path, *, world_size: int = 2, timeout_seconds: float = _NEVER, rank: int | None = None
) -> subprocess.Popen[str]:
    """The command's process; with `rank` as one of the ranks that some launcher started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "SLURM"))}
    environment["OMP_NUM_THREADS"] = "1"
    if rank is not None:
        meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port_of(folder)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **meeting_point}
    arguments = [job, str(folder), str(world_size), str(timeout_seconds)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.launched_jobs", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _port_of(folder: Path) -> str:
    return str(20_000 + hash(str(folder)) % 10_000)


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors.splitlines()


def _wait_until(condition: Callable[[], bool], timeout_seconds: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _running_ranks(folder: Path) -> dict[int, int]:
    """Process ids of the ranks that take steps."""
    names = [re.fullmatch(r"running-(\d+)-(\d+)", file.name) for file in folder.iterdir()]
    return {int(name[1]): int(name[2]) for name in names if name is not None}


def test_the_rank_that_raised_is_named_with_its_own_traceback_and_only_it(tmp_path: Path) -> None:
    status, _, errors = _finish(_start("raises_on_rank_1", tmp_path))

    assert status == 1
    assert errors[:2] == ["rank 1 failed in phase rollout:", "Traceback (most recent call last):"]
    assert errors[-1] == "megatron-rlt: error: rank 1 failed in phase rollout: RuntimeError: boom on purpose"
    assert sum("Traceback" in line for line in errors) == 1
    assert not any("gloo" in line for line in errors)


def test_a_fault_of_the_user_met_by_every_rank_is_one_line_and_status_2(tmp_path: Path) -> None:
    status, _, errors = _finish(_start("reads_bad_input", tmp_path))
    expected = f"{tmp_path}/missing.yaml: no such file; give the path of a YAML file"
    assert (status, errors) == (2, [f"megatron-rlt: error: {expected}"])


def test_a_hanging_rank_is_named_with_its_phase_and_stacks(tmp_path: Path) -> None:
    # Long enough for the start-up of two ranks on a busy machine: importing Megatron beats only once.
    status, _, errors = _finish(_start("hangs_on_rank_1", tmp_path, timeout_seconds=15))

    assert status == 1
    message = (
        r"megatron-rlt: error: rank 1 failed in phase rollout: no progress for 1\d\.\d s; stacks of all threads in "
    )
    assert re.match(message, errors[-1])
    assert "in hangs_on_rank_1" in (tmp_path / "stacks-rank-1.txt").read_text()


def test_a_killed_rank_ends_all_and_is_named_with_its_signal(tmp_path: Path) -> None:
    process = _start("waits_for_nobody", tmp_path)
    _wait_until(lambda: len(_running_ranks(tmp_path)) == 2)
    started = time.monotonic()
    os.kill(_running_ranks(tmp_path)[1], signal.SIGKILL)

    status, _, errors = _finish(process)

    assert time.monotonic() - started < _PEERS_MAY_LIVE_SECONDS
    why = "killed by SIGKILL (the system ran out of memory, or someone killed it)"
    assert (status, errors) == (1, [f"megatron-rlt: error: rank 1 failed in phase update: {why}"])


def test_sigterm_reaches_all_ranks_and_their_status_is_the_commands(tmp_path: Path) -> None:
    process = _start("runs_until_asked", tmp_path)
    _wait_until(lambda: len(_running_ranks(tmp_path)) == 2)
    process.send_signal(signal.SIGTERM)
    assert _finish(process) == (75, "", [])


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = _start("runs_until_asked", tmp_path)
    _wait_until(lambda: len(_running_ranks(tmp_path)) == 2)
    ranks = _running_ranks(tmp_path).values()
    process.kill()
    process.communicate(timeout=60)
    _wait_until(lambda: not any(_is_alive(pid) for pid in ranks), timeout_seconds=_PEERS_MAY_LIVE_SECONDS)


def test_one_rank_runs_in_the_commands_own_process(tmp_path: Path) -> None:
    process = _start("runs_until_asked", tmp_path, world_size=1)
    _wait_until(lambda: len(_running_ranks(tmp_path)) == 1)
    assert _running_ranks(tmp_path) == {0: process.pid}
    process.send_signal(signal.SIGUSR1)
    assert _finish(process) == (75, "", [])


def test_under_another_launcher_the_culprit_speaks_first_and_peers_only_say_that_they_lost_it(tmp_path: Path) -> None:
    started = [_start("raises_on_rank_1", tmp_path, rank=rank) for rank in range(2)]
    (status_0, _, errors_0), (status_1, _, errors_1) = (_finish(process) for process in started)

    assert (status_0, status_1) == (1, 1)
    assert errors_1[0] == "rank 1 failed in phase rollout:"
    assert errors_1[-1] == "megatron-rlt: error: rank 1 failed in phase rollout: RuntimeError: boom on purpose"
    assert len(errors_0) == 1
    assert errors_0[0].startswith("megatron-rlt: error: rank 0 failed in phase rollout: ")


def _is_alive(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
