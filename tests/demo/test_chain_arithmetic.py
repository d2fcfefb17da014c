import random
from collections import Counter

import pytest

from tools.demo.chain_arithmetic import (
    NUM_OPERATIONS,
    OPERATIONS,
    Style,
    apply,
    classify,
    draw_questions,
    noisy_trace,
    running_values,
    solve,
)

# 5+5=10=3, 3*5=15=1, 1*6=6, 6+4=10=3 (mod 7)
QUESTION = "5 +5 *5 *6 +4"


def test_operations_are_the_eleven_that_change_something() -> None:
    assert OPERATIONS == ("+1", "+2", "+3", "+4", "+5", "+6", "*2", "*3", "*4", "*5", "*6")
    assert apply("+6", 3) == 2  # 9
    assert apply("*6", 4) == 3  # 24


def test_chains_are_worked_from_left_to_right_modulo_seven() -> None:
    assert running_values(QUESTION) == [3, 1, 6, 3]
    assert solve(QUESTION) == "3"
    assert running_values("0 *3 +1 *2 +6") == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("style", "explanation"),
    [
        (Style.CAREFUL, "5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 ;"),
        (Style.CAREFUL, "well , 5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 ; so we get 3 ."),
        (Style.SLOPPY, "5 +5 = 3 *5 = 2 *6 = 5 +4 = 2 ; so we get 3 ."),  # 3*5 is 1
        (Style.SLOPPY, "5 +5 = 3 *6 = 4 ; so we get 3 ."),  # not the question's next operation
        (Style.SLOPPY, "5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 +1 = 4 ;"),  # a fifth step
        (Style.SLOPPY, "4 +5 = 2 ; so we get 3 ."),  # another start
        (Style.SLOPPY, "5 some coffee +5 = 3 ; so we get 3 ."),  # no operand before the operation
        (Style.SLOPPY, "+5 = 3 ; so we get 3 ."),
        (Style.SLOPPY, "5 +5 so we get 3 ."),  # no result
        (Style.LEAP, "so we get 3 ."),
        (Style.LEAP, "ok , 5 +5 = 3 ; so we get 3 ."),
        (Style.LEAP, "numbers can be fun . so we get 3 ."),
        (Style.WRONG, "so we get 4 ."),
        (Style.WRONG, "so we get"),
        (Style.WRONG, "5 +5 = 3 *5 = 1 *6 = 6 +4 = 3 ; so we get 4 ."),
        (Style.RAMBLE, "numbers can be fun ."),
        (Style.RAMBLE, "5 +5 = 3 *5 = 1 ;"),
        (Style.RAMBLE, ""),
    ],
)
def test_styles_are_recognised_from_text(style: Style, explanation: str) -> None:
    assert classify(QUESTION, explanation) is style


def test_questions_are_distinct_and_their_operations_too() -> None:
    questions = draw_questions(random.Random(0), 2000)
    assert len(set(questions)) == 2000
    assert all(len(set(question.split()[1:])) == NUM_OPERATIONS for question in questions)


def test_traces_are_the_recipes_mixture() -> None:
    """careful .20, sloppy .10, leap .50 hasty + .10 of the rambling, ramble .10; 4 standard errors of 4,000 draws."""
    rng = random.Random(1)
    styles: Counter[Style] = Counter()
    for question in draw_questions(rng, 4000):
        styles[classify(question, noisy_trace(rng, question))] += 1
    expected = {Style.CAREFUL: 0.20, Style.SLOPPY: 0.10, Style.LEAP: 0.60, Style.RAMBLE: 0.10}
    for style, share in expected.items():
        assert abs(styles[style] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert styles[Style.WRONG] == 0
