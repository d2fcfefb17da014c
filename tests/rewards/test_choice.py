"""The letter of a multiple-choice answer, rule by rule."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlt.rewards.choice import choice_letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # 1. The box, alone or as a label, and nothing else once there is one.
        (r"The answer is A. \boxed{B}", "B"),
        (r"\boxed{(b)}", "B"),
        (r"\boxed{\textbf{(D)}}", "D"),
        (r"\boxed{C) 12 m/s}", "C"),
        (r"\boxed{A, B}", None),
        (r"The answer is A. \boxed{12}", None),
        (r"\boxed{\text{Option B}}", "B"),
        (r"\boxed{\text{options vary}}", None),
        # 2. The last statement.
        ("The answer is C.", "C"),
        ("**Answer:** (B)", "B"),
        ("Answer: $\\textbf{E}$", "E"),
        ("The correct option is **D**, since ...", "D"),
        ("At first the answer is A, but no: the answer is option B. Option C is out, too.", "B"),
        ("The answer is (A) 5.", "A"),
        ("The answer is A because it is.", "A"),
        ("The answer is a matter of taste.", None),
        ("The answer is A good one.", None),
        ("the answer I found", None),
        ("The answer is Bold.", None),
        ("the answer is b", None),
        ("The answer is (b).", "B"),
        ("The answer must be B.", "B"),
        ("The answer must not be B.", None),
        ("答案是B。", "B"),
        ("答案：\uff22", "B"),
        ("That was the answer. B is a letter.", None),
        # 3. The last line.
        ("Let me think.\n\nC", "C"),
        ("Final answer:\n(c)\n", "C"),
        ("It must be so:\nD. the third law", "D"),
        ("So:\nOption B", "B"),
        ("Choice (B): 12 m", "B"),
        ("Optional", None),
        ("A or B", None),
        ("C\nthat was it", None),
        ("", None),
    ],
)
def test_the_rules_by_example(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


@settings(deadline=None)
@given(
    letter=st.sampled_from(string.ascii_uppercase),
    form=st.sampled_from(
        [r"\boxed{@}", r"\boxed{\text{@}}", "The answer is @.", "Answer: (@)", "so\n\n**@**", "@) 12"]
    ),
)
def test_every_letter_is_read_in_every_form(letter: str, form: str) -> None:
    assert choice_letter(form.replace("@", letter)) == letter


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_is_too_odd(text: str) -> None:
    found = choice_letter(text)
    assert found is None or found in string.ascii_uppercase
