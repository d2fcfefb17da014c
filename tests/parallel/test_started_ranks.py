"""Signals that end the launcher, and what it shows of its ranks' output."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.parallel.forked_jobs import start_forked

_PATIENCE_SECONDS = 60.0


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Any]:
    """The process of a launcher whose two ranks run."""
    process = start_forked("handles_no_signal", tmp_path, timeout_seconds=600.0)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(list(tmp_path.glob("running-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


def _end(launcher: Any, number: signal.Signals) -> int:
    """Its exit status; no rank outlives it."""
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    os.kill(launcher.pid, number)
    launcher.join(_PATIENCE_SECONDS)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    status: int = launcher.exitcode
    return status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_the_command_ends_its_ranks_without_a_word(
    launcher: Any, number: signal.Signals, tmp_path: Path
) -> None:
    assert _end(launcher, number) == 128 + number
    assert "megatron-rlt" not in (tmp_path / "errors").read_text()


def test_a_request_to_save_that_comes_before_the_first_step_is_explained(launcher: Any, tmp_path: Path) -> None:
    assert _end(launcher, signal.SIGTERM) == 75
    last = (tmp_path / "errors").read_text().splitlines()[-1]
    assert last == "megatron-rlt: ended by SIGTERM before the first step; there was nothing to save"


def test_output_is_the_first_ranks_and_errors_stand_under_their_rank(launcher: Any, tmp_path: Path) -> None:
    _end(launcher, signal.SIGINT)
    assert (tmp_path / "output").read_text() == "output of 0\n"
    shown = (tmp_path / "errors").read_text().splitlines()
    assert {"rank 0: warning of 0", "rank 1: warning of 1"} <= set(shown)
    (logs,) = (tmp_path / "logs").iterdir()
    assert (logs / "rank-1.out").read_text() == "output of 1\n"
    assert (logs / "rank-1.err").read_text().startswith("warning of 1\n")
