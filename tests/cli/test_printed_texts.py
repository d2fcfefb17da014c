"""What a user's ids, keys and paths hold cannot begin a line of its own, or act on the terminal."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from megatron_rlt.cli import guarded
from megatron_rlt.given_files import FaultsError
from megatron_rlt.jobs.run.frame import _Lines
from megatron_rlt.launch.failures import failure_of_exception, report
from megatron_rlt.visible_text import one_line

HOSTILE = "p1\nmegatron-rlt: error: forged\r\x1b[2Jx\u2028y\u202ez\ud800"
SHOWN = r"p1\nmegatron-rlt: error: forged\r\x1b[2Jx\u2028y\u202ez\ud800"


def test_acting_characters_are_escaped_and_others_stay() -> None:
    assert one_line(HOSTILE) == SHOWN
    assert one_line("Größe 大 é 😀") == "Größe 大 é 😀"


def test_each_fault_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise FaultsError([f"first {HOSTILE}", "second"])

    assert guarded(fail) == 2
    assert capsys.readouterr().err == f"megatron-rlt: error: first {SHOWN}\nmegatron-rlt: error: second\n"


def test_what_a_rank_reports_of_an_error_cannot_act() -> None:
    failed = failure_of_exception(RuntimeError(f"problem {HOSTILE}"), rank=1, phase="data")
    assert report(replace(failed, details="")) == (
        "megatron-rlt: error: rank 1 failed in phase data: RuntimeError: problem p1\n"
    )
    hidden = failure_of_exception(RuntimeError("problem \x1b[2J"), rank=1, phase="data")
    assert hidden.message == r"RuntimeError: problem \x1b[2J"


def test_a_line_of_the_log_is_one_line() -> None:
    record = logging.makeLogRecord({"msg": "problem %s", "args": (HOSTILE,)})
    assert _Lines("%(message)s").format(record) == f"problem {SHOWN}"
