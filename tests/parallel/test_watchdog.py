"""The watchdog in real processes that really hang."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_START = """
import ctypes, sys, time
from pathlib import Path
from megatron_rlt.launch.watchdog import Heartbeat

def wait_for_a_peer_that_never_comes():
    time.sleep(60)

with Heartbeat(rank=3, folder=Path(sys.argv[1]), timeout_seconds=0.4) as heartbeat:
"""


def _run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _START + body, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_a_hang_ends_the_process_and_leaves_line_and_stacks(tmp_path: Path) -> None:
    started = time.monotonic()
    result = _run(
        tmp_path / "run", '    heartbeat.beat("scoring", "pack 2 of 5")\n    wait_for_a_peer_that_never_comes()\n'
    )

    assert result.returncode == 1
    assert time.monotonic() - started < 20
    assert result.stderr.startswith("rank 3 failed in phase scoring: no progress for 0.")
    assert "s (pack 2 of 5); stacks of all threads in" in result.stderr
    stacks = (tmp_path / "run" / "stacks-rank-3.txt").read_text()
    assert "in wait_for_a_peer_that_never_comes" in stacks


def test_beats_keep_a_slow_process_alive_and_nothing_is_left_behind(tmp_path: Path) -> None:
    result = _run(tmp_path, "    for number in range(10):\n        heartbeat.beat('update')\n        time.sleep(0.1)\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_hang_that_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    # PyDLL keeps the interpreter's lock during the call: no Python thread can run.
    result = _run(tmp_path, "    time.sleep(0.2)\n    ctypes.PyDLL(None).sleep(40)\n")
    assert result.returncode == 1
    assert "Timeout" in result.stderr
    assert "<module>" in result.stderr
