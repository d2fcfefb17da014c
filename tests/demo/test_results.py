"""The figures of the demo, from a few explanations and curves whose shares and means are plain to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.accuracy import Accuracy, Answers
from tools.demo.chain_arithmetic import Style, classify
from tools.demo.picture import draw
from tools.demo.results import DemoResults, Student
from tools.demo.seeds import summary
from tools.rl_curves import RlCurves, style_shares

QUESTION = "5 +5 *5 *6 +4"  # 3, 1, 6, 3
CAREFUL, LEAP = "5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 ;", "so we get 3 ."


def _student(greedy: float, *, careful: float) -> Student:
    shares = {style.value: 0.0 for style in Style} | {"careful": careful, "leap": 1 - careful}
    return Student(_answers(greedy), shares, [2.0, 1.0])


def _answers(greedy: float) -> Answers:
    return Answers(Accuracy(greedy, 0.02), Accuracy(greedy / 2, 0.02))


def _results(*, rlt: float, lambda0: float) -> DemoResults:
    styles = [{style.value: 0.0 for style in Style} | {"careful": step / 10} for step in range(10)]
    run = RlCurves({"reward": [float(step) for step in range(10)]}, styles)
    greedy = {"original": 0.4, "warm": 0.5, "rlt": rlt, "lambda0": lambda0, "best": 0.7}
    own_rl = {"scorer": _answers(0.4), "rlvr": _answers(0.9)}
    return DemoResults({"rlt": run}, {name: _student(mean, careful=0.25) for name, mean in greedy.items()}, own_rl, {})


def test_style_shares_count_each_explanation_once() -> None:
    texts = (CAREFUL, LEAP, LEAP, "my cat sleeps .")
    shares = style_shares(classify(QUESTION, text) for text in texts)
    assert shares == {"careful": 0.25, "leap": 0.5, "ramble": 0.25, "sloppy": 0.0, "wrong": 0.0}


def test_ends_are_means_of_the_first_three_and_the_last_five_steps() -> None:
    run = _results(rlt=0.9, lambda0=0.15).rl["rlt"]
    assert run.ends("reward") == (1.0, 7.0)  # (0 + 1 + 2) / 3, (5 + ... + 9) / 5
    assert run.style_ends(Style.CAREFUL) == pytest.approx((0.1, 0.7))
    assert run.style_ends(Style.LEAP) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("rlt", "lambda0", "ahead", "near"),
    [(0.9, 0.15, True, True), (0.79, 0.19, False, True), (0.81, 0.2, True, False), (0.9, 0.09, True, False)],
)
def test_a_seed_is_judged_against_the_better_of_both_others_and_against_chance(
    rlt: float, lambda0: float, ahead: bool, near: bool
) -> None:
    """Chance is 1/7 = 0.1429, so near it lies between 0.0929 and 0.1929; ahead of 0.5 by 0.3 means 0.8."""
    found = summary(_results(rlt=rlt, lambda0=lambda0))
    assert found["rlt_ahead_of_both_greedy"] == pytest.approx(rlt - 0.5)
    assert found["rlt_ahead_as_asked"] is ahead
    assert found["lambda0_near_chance_as_asked"] is near
    assert found["students"]["warm"]["sampled"]["mean"] == 0.25
    assert found["own_rl"]["rlvr"]["greedy"] == {"mean": 0.9, "standard_error": 0.02}


def test_the_picture_has_a_bar_for_every_student(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    draw(_results(rlt=0.1, lambda0=0.1), small)
    draw(_results(rlt=0.9, lambda0=0.1), large)
    assert small.read_bytes() != large.read_bytes()
