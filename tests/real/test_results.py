"""The figures of `make real` from a handful of rewards whose means are plain to see."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tools.accuracy import Accuracy
from tools.real.layouts import LayoutGap
from tools.real.picture import draw
from tools.real.report import examples_page
from tools.real.results import Example, HeldOut, Mean, RealResults, Student, mean_of
from tools.rl_curves import CURVES, RlCurves

STYLES = {"careful": 0.5, "sloppy": 0.25, "leap": 0.25}


def _results(*, reward: float) -> RealResults:
    parts = {name: Mean(reward, 0.1) for name in ("reward", "r_ss")}
    held_out = {name: HeldOut(4, parts, parts, STYLES, 30.0) for name in ("warm", "rlt")}
    student = Student(Accuracy(0.5, 0.1), None, STYLES, [1.0])
    return RealResults(
        layouts=[LayoutGap("teacher", "pp 2", "a - b", 3, 1e-6, 2e-6)],
        losses={},
        rl=RlCurves({name: [reward, 0.0] for name in CURVES}, [STYLES, STYLES]),
        by_style={},
        by_last_number={},
        held_out=held_out,
        changes=parts,
        reward_changes={},
        untaught=Accuracy(0.1, 0.02),
        students={"original": student},
        examples=[],
        seconds={},
    )


def test_a_mean_has_its_standard_error() -> None:
    """1, 2, 3: variance (1 + 0 + 1) / 2 = 1, so the error is 1 / sqrt(3)."""
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.mean, found.standard_error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(mean_of([1.0]).standard_error)


def test_an_explanation_stands_on_the_page_beside_its_parts() -> None:
    example = Example(
        "How many?", r"Hence 3. \boxed{3}", {"warm": "One.\nTwo."}, {"warm": {"reward": -1.234, "r_ss": -0.5}}
    )
    lines = examples_page([example]).splitlines()
    assert lines[0] == "**1.** How many?"
    assert "- the warm teacher: reward -1.23, r_SS -0.50" in lines
    assert lines[lines.index("  ```text") :][1:4] == ["  One.", "  Two.", "  ```"]


def test_the_picture_shows_the_rewards_and_what_has_not_run_leaves_it_whole(tmp_path: Path) -> None:
    low, high, nothing = (tmp_path / name for name in ("low.png", "high.png", "nothing.png"))
    draw(_results(reward=-1.0), low)
    draw(_results(reward=-0.5), high)
    draw(RealResults([], {}, None, {}, {}, {}, {}, {}, None, {}, [], {}), nothing)
    assert len({file.read_bytes() for file in (low, high, nothing)}) == 3
