"""Where an answer stands in a completion, and whether the completion has the form it should have."""

from __future__ import annotations

import pytest

from megatron_rlt.rewards.answers import AnswerTags, answer_text, is_well_formed, last_boxed, solution_section

TAGS = AnswerTags("<think>", "</think>", "<solution>", "</solution>")
ONE_WORD_TAGS = AnswerTags("<exp>", "", "<sol>", "")
GOOD = "<think>\n2 and 2\n</think>\n\n<solution>four</solution>\n"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),  # the escaped brace is never closed
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\fbox {3}", "3"),
        (r"\boxed{}", ""),
        ("nothing", None),
        ("\\boxed{\\", None),
    ],
)
def test_the_last_closed_box_counts(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


def test_the_solution_section_is_what_follows_the_last_opening_tag() -> None:
    assert solution_section("<solution>a</solution><solution>b</solution>c", TAGS) == "b"
    assert solution_section("<solution>cut off", TAGS) == "cut off"
    assert solution_section("no tag", TAGS) is None
    assert solution_section("<exp> so <sol> 3", ONE_WORD_TAGS) == " 3"


def test_a_box_goes_before_the_section_and_the_sections_own_box_before_others() -> None:
    both = r"<think>\boxed{1}</think><solution>\boxed{2}</solution>\boxed{3}"
    assert answer_text(both, TAGS) == r"\boxed{2}"
    assert answer_text(r"<think>\boxed{1}</think><solution>2</solution>", TAGS) == r"\boxed{1}"
    assert answer_text(r"<think>\boxed{1}", TAGS) == r"\boxed{1}"
    assert answer_text("<think>1</think><solution>2</solution>", TAGS) == "2"
    assert answer_text("<think>1</think>", TAGS) is None
    assert answer_text("it is 1", None) == "it is 1"


def test_thought_then_solution_is_well_formed() -> None:
    assert is_well_formed(GOOD, TAGS, thought_is_open=False)
    assert is_well_formed(GOOD.removeprefix("<think>"), TAGS, thought_is_open=True)
    assert is_well_formed(" 5 +5 = 3 ; <sol> 3", ONE_WORD_TAGS, thought_is_open=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<think>", ""),
        ("</think>", ""),
        ("<solution>", ""),
        ("</solution>", ""),
        ("</think>", "</think></think>"),
        ("2 and 2", "2 <solution> 2"),
        ("2 and 2", " "),
        ("four", ""),
        ("<think>", "Sure! <think>"),
        ("</think>", "</think> well"),
        ("</solution>", "</solution> bye"),
        (GOOD, "<solution>four</solution><think>2 and 2</think>"),
    ],
)
def test_any_other_form_is_malformed(old: str, new: str) -> None:
    assert not is_well_formed(GOOD.replace(old, new), TAGS, thought_is_open=False)


def test_with_empty_closing_tags_the_parts_must_still_be_there() -> None:
    assert not is_well_formed("<exp> <sol> 3", ONE_WORD_TAGS, thought_is_open=False)
    assert not is_well_formed("<exp> 1 <sol> ", ONE_WORD_TAGS, thought_is_open=False)


def test_a_solution_without_tags_is_what_follows_the_thought() -> None:
    tags = AnswerTags("<think>", "</think>", "", "")
    assert solution_section("a</think>\n\nIt is 4.", tags) == "\n\nIt is 4."
    assert solution_section("no tag", tags) is None
    assert answer_text("<think>\\boxed{1}</think>\\boxed{2}", tags) == r"\boxed{2}"
    assert is_well_formed("a\n</think>\n\n4", tags, thought_is_open=True)
    assert is_well_formed("<think>\na\n</think>\n\n4", tags, thought_is_open=False)
    for text in ("a</think> \n", " </think>4", "a</think>4</think>5", "a 4", "<think>a</think>4"):
        assert not is_well_formed(text, tags, thought_is_open=True), text
