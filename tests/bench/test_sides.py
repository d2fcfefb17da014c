"""A side's processes take their turns one at a time, and one that ends early is not waited for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.bench.sides import start_alone, start_ranks

# Rank r says that its n-th turn took n + r seconds; libraries print, too.
_RANK = """
import os
from tools.bench.turns import report, turns
rank = int(os.environ["RANK"])
for number in turns():
    print("noise")
    report({"seconds": number + rank, "processor_seconds": 1.5, "phases": {"all": number}, "mean_reward": -rank})
"""
_FAILS = "from tools.bench.turns import turns\nfor number in turns(): raise SystemExit('out of luck')"


def test_a_side_of_two_ranks_reports_its_slowest_and_the_sum_of_its_processor_time(tmp_path: Path) -> None:
    side = start_ranks([sys.executable, "-c", _RANK], name="ranks", num_ranks=2, num_threads=1, folder=tmp_path)
    for _ in range(4):
        side.take_turn()
    side.close()
    assert [process.returncode for process in side.processes] == [0, 0]
    turns = side.turns(after=1)
    assert turns.seconds == [2, 3, 4]
    assert turns.median_seconds == 3
    assert turns.processor_seconds == [3.0, 3.0, 3.0]
    assert turns.median_phase("all") == 2
    assert turns.mean_rewards == [0, 0, 0]
    assert 2 * 4 * 2**20 < turns.peak_bytes < 2 * 64 * 2**20, "two small interpreters, whatever this process holds"


def test_a_side_that_ends_within_its_turn_says_why(tmp_path: Path) -> None:
    side = start_alone([sys.executable, "-c", _FAILS], name="alone", num_threads=1, folder=tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        side.take_turn()
    side.close()


def test_a_side_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        start_alone([sys.executable, "-m", "no_such_module"], name="none", num_threads=1, folder=tmp_path)
