"""Whether another step fits before a job's end, by what steps and saves took."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_rlt.jobs.run.time_left import TimeLeft


def test_the_slowest_step_and_save_and_a_margin_must_fit(tmp_path: Path) -> None:
    left = TimeLeft(tmp_path, end=time.time() + 200, is_writer=True)
    assert left.lead_seconds(num_saves=1) == 20
    for seconds in (70.0, 100.0, 60.0):
        left.measure_step(seconds)
    assert left.lead_seconds(num_saves=1) == pytest.approx(1.1 * 100 + 20)
    assert not left.is_over(num_saves=1)  # 130 of 200 seconds
    left.measure_save(80.0)
    assert left.lead_seconds(num_saves=1) == pytest.approx(1.1 * 180 + 20)
    assert left.is_over(num_saves=1)  # 218 of 200


def test_a_save_that_is_due_or_being_written_needs_its_time_too(tmp_path: Path) -> None:
    left = TimeLeft(tmp_path, end=time.time() + 200, is_writer=True)
    left.measure_step(50.0)
    left.measure_save(60.0)
    assert not left.is_over(num_saves=1)  # 1.1 * 110 + 20 = 141 of 200
    assert left.is_over(num_saves=2)  # 1.1 * 170 + 20 = 207


def test_the_next_start_knows_what_the_last_one_measured(tmp_path: Path) -> None:
    first = TimeLeft(tmp_path, end=time.time() + 1000, is_writer=True)
    first.measure_step(300.0)
    first.measure_save(50.0)
    assert TimeLeft(tmp_path, end=time.time() + 400, is_writer=False).is_over(num_saves=1)  # 405 of 400
    assert not TimeLeft(tmp_path, end=time.time() + 410, is_writer=False).is_over(num_saves=1)


def test_without_an_end_there_is_always_time(tmp_path: Path) -> None:
    left = TimeLeft(tmp_path, end=None, is_writer=True)
    left.measure_step(1e6)
    assert not left.is_over(num_saves=1)
    assert not list(tmp_path.iterdir())
