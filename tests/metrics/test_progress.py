"""Progress for people: a live display on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from megatron_rlt.metrics.progress import Progress


@pytest.mark.parametrize("piece", ["step", "part"])
def test_without_a_terminal_a_step_is_one_line(piece: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(file=io.StringIO(), force_terminal=False)
    with Progress(title="train", piece=piece, first_step=3, num_steps=5, console=console, is_reporter=True) as progress:
        progress.show_phase("rollout")
        progress.finish_step(4, {"reward": -0.51234, "tokens/s": 1234.5})
    assert [record.getMessage() for record in caplog.records] == [
        f"train: {piece} 4 of 5: reward -0.5123  tokens/s 1234, 0:00:00 left"
    ]


def test_a_terminal_shows_phase_values_and_position() -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120)
    with Progress(
        title="train", piece="step", first_step=0, num_steps=5, console=console, is_reporter=True
    ) as progress:
        progress.finish_step(2, {"reward": -0.5})
        progress.show_phase("student")
    for expected in ("train", "2/5", "student", "reward -0.5", "left"):
        assert expected in drawn.getvalue()


def test_other_ranks_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True)
    with Progress(
        title="train", piece="step", first_step=0, num_steps=5, console=console, is_reporter=False
    ) as progress:
        progress.finish_step(1, {"reward": 1.0})
    assert drawn.getvalue() == ""
    assert caplog.records == []
