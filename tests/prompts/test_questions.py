"""What stands in the user's turn."""

from __future__ import annotations

from megatron_rlt.prompts.student import asked_text


def test_choices_are_listed_by_letter_where_the_template_wants_the_question() -> None:
    text = asked_text("Which is odd?", ("2", "3", "{question}"), template="Put \\boxed{}. {question}\nGo.")
    assert text == "Put \\boxed{}. Which is odd?\n\nA) 2\nB) 3\nC) {question}\nGo."


def test_a_question_without_choices_stays_as_it_is() -> None:
    assert asked_text("2 + 2 = {x}?\n", (), template="{question}") == "2 + 2 = {x}?\n"
