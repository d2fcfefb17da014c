"""Kinds of answers that were once judged wrongly: what real references, models and questions write."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rlt.rewards.countdown import CountdownTask, asks_for_all, read_task
from megatron_rlt.rewards.units import without_units
from megatron_rlt.rewards.verifiable import VerifiableKind, Verifier
from megatron_rlt.types import Problem

Judges = dict[VerifiableKind, Verifier]
SEVEN = "Using the numbers 3, 5, 7, write an expression that equals 26. Use each number exactly once."
TWELVE = "Using the numbers 12, 3, 2, write an expression that equals 6. Use each number exactly once."
SOME = "Using the numbers 3, 5, 7, 100, write an expression that equals 26."


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    kinds: tuple[VerifiableKind, ...] = ("math", "choice", "countdown")
    judges: Judges = {kind: Verifier(kind, tags=None, timeout_seconds=20.0) for kind in kinds}
    yield judges
    for judge in judges.values():
        judge.close()


def is_right(judge: Verifier, reference: str, answer: str, question: str = "?") -> bool:
    problem = Problem("p", question, reference)
    judge.check(problem)
    return judge.verdict(problem, answer).correct


@pytest.mark.parametrize("reference", ["x = 5 or x = 7", "5 and 7", r"\boxed{5} or \boxed{7}", "$5$, $7$", "5; 7"])
def test_all_values_of_a_reference_are_wanted(judges: Judges, reference: str) -> None:
    assert is_right(judges["math"], reference, r"\boxed{5, 7}")
    assert is_right(judges["math"], reference, r"\boxed{7 \text{ or } 5}")
    assert not is_right(judges["math"], reference, r"\boxed{7}")
    assert not is_right(judges["math"], reference, r"\boxed{5}")
    assert not is_right(judges["math"], "7", f"It is {reference}.")


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("3 hours 20 minutes", r"200 \text{ minutes}", "20"),
        ("6 cm by 4 cm", "6, 4", "4"),
        ("5 feet 3 inches", "63 inches", "3"),
    ],
)
def test_quantities_of_several_numbers_are_whole(judges: Judges, reference: str, right: str, wrong: str) -> None:
    assert is_right(judges["math"], reference, f"\\boxed{{{reference}}}")
    assert is_right(judges["math"], reference, f"\\boxed{{{right}}}")
    assert not is_right(judges["math"], reference, f"\\boxed{{{wrong}}}")


@pytest.mark.parametrize(
    "solution",
    [
        *("between 5 and 7", "5 to 7", "5 remainder 2", "not 5", "5 or none", "3 dozen", "5 because 2 + 3 is 5"),
        *("The answer is 5. Also 7.", r"First \boxed{5}, long after it \boxed{7}.", "5 unless x is 6"),
    ],
)
def test_a_reference_of_which_a_part_is_not_understood_is_refused(judges: Judges, solution: str) -> None:
    with pytest.raises(ValueError, match=r"^problem row-9: [^\n]*; correct the row or drop it$"):
        judges["math"].check(Problem("row-9", "?", solution))


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"6.63\times 10^{-34}", r"1.05\times 10^{-34}"),
        (r"1.6\times 10^{-19}", r"9.1\times 10^{-31}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("0.0000004", "0.0000001"),
        ("0.0000004", "0"),
        (r"10^{-7}, 2\cdot 10^{-7}", r"3\cdot 10^{-7}, 5\cdot 10^{-7}"),
        (r"e^{-50}", r"e^{-51}"),
    ],
)
def test_tiny_numbers_differ(judges: Judges, reference: str, answer: str) -> None:
    assert not is_right(judges["math"], reference, f"\\boxed{{{answer}}}")
    assert is_right(judges["math"], reference, f"\\boxed{{{reference}}}")


@settings(max_examples=60, deadline=None)
@given(digits=st.integers(100_001, 999_999), exponent=st.integers(-300, 300))
@example(digits=999_769, exponent=-300)
def test_six_digits_count_at_every_size(judges: Judges, digits: int, exponent: int) -> None:
    """Of a number written as a decimal times a power of ten; the next number with as many digits is another one."""
    reference = f"{digits / 10**5:.5f}\\times 10^{{{exponent}}}"
    assert is_right(judges["math"], reference, f"\\boxed{{{digits}\\cdot 10^{{{exponent - 5}}}}}")
    assert is_right(judges["math"], reference, f"\\boxed{{{digits / 10**5:.5f}e{exponent:+03d}}}")
    if exponent < 0:
        assert not is_right(judges["math"], reference, f"\\boxed{{{digits + 1}\\cdot 10^{{{exponent - 5}}}}}")


@settings(max_examples=40, deadline=None)
@given(value=st.floats(1e-300, 1e300))
def test_a_number_in_pythons_notation_is_the_number(judges: Judges, value: float) -> None:
    assert is_right(judges["math"], repr(value), f"\\boxed{{{value!r}}}")
    exact = Fraction(repr(value))
    assert is_right(judges["math"], repr(value), f"\\boxed{{\\frac{{{exact.numerator}}}{{{exact.denominator}}}}}")


def test_the_e_of_an_exponent_is_not_eulers(judges: Judges) -> None:
    for reference in ("1e-05", "1E-5", "0.00001"):
        assert is_right(judges["math"], reference, r"\boxed{10^{-5}}")
        assert not is_right(judges["math"], reference, r"\boxed{e-5}")
    assert is_right(judges["math"], "e-5", r"\boxed{e-5}")


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("1011_2", r"1011_{\text{two}}", "1011_3"),
        ("1011_2", "1011_{2}", "1011"),
        ("5 cm", "5", r"5 \text{ kg}"),
        ("5 cm", r"5\text{ cm}", r"5 \text{ m}"),
        (r"5 \text{ m}", "500 cm", r"5\text{ m}^2"),
        ("60 km/h", r"60 \text{ km/h}", r"60 \text{ m/s}"),
        ("€25", "25", r"\$25"),
        (r"\$0.50", "50 cents", r"50 \text{ dollars}"),
        ("25°C", r"25^\circ\text{C}", "25°F"),
        ("3:45 PM", r"3:45 \text{ p.m.}", "3:45 AM"),
        ("3:45", "3:45", "1:15"),
        ("2t", "2t", "2"),
    ],
)
def test_what_changes_the_value_counts(judges: Judges, reference: str, right: str, wrong: str) -> None:
    assert is_right(judges["math"], reference, f"\\boxed{{{right}}}")
    assert not is_right(judges["math"], reference, f"\\boxed{{{wrong}}}")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        *((number, form) for number in ("73", "73.") for form in ("73.", "**73**", "The answer is 73.", r"\(73\)")),
        *(("73", f"\\boxed{{{form}}}") for form in ("73.", "**73**", "`73`", "73°", "€73", "\\$73", "７３", "73 %")),
        (r"90^\circ", "90°"),
        ("25°C", r"\boxed{25}"),
        ("Yes.", r"\boxed{Yes}"),
        (r"\sqrt{2}", r"\boxed{√2}"),
        (r"2\sqrt{x+1}", r"\boxed{2√(x+1)}"),
        (r"\infty", r"\boxed{∞}"),
        (r"-\infty", "-∞"),
        ("1234567", r"\boxed{1\,234\,567}"),
        ("1234567", "\\boxed{1\u202f234\u2009567}"),
        ("(-2,7)", r"\boxed{-2<x<7}"),
        (r"x \le 3", r"\boxed{(-∞, 3]}"),
        (r"\frac{5}{2}", "2½"),
        (r"\frac{1}{6}", r"\boxed{0.1\overline{6}}"),
    ],
)
def test_signs_around_and_inside_an_answer_do_not_hide_it(judges: Judges, reference: str, answer: str) -> None:
    assert is_right(judges["math"], reference, answer)


@settings(max_examples=80, deadline=None)
@given(
    value=st.integers(-9999, 9999),
    form=st.sampled_from(["@", "@.", "**@**", "$@$", r"\(@\)", "x = @", "`@`", "@ cm", "The answer is @.", "#### @"]),
    boxed=st.booleans(),
)
def test_every_form_of_a_number_is_that_number_and_no_other(judges: Judges, value: int, form: str, boxed: bool) -> None:
    answer = form.replace("@", str(value))
    answer = f"So \\boxed{{{answer}}}." if boxed and form[0] not in "T#" else answer
    assert is_right(judges["math"], str(value), answer)
    assert not is_right(judges["math"], str(value + 1), answer)


@pytest.mark.parametrize("text", ["3x + 2h", "2h", "2 sec x", r"\min(3, s)", "5 apples", "100 percent", "f(m)"])
def test_what_is_no_unit_stays(text: str) -> None:
    assert without_units(text) == (text, None)


@pytest.mark.parametrize(
    "answer",
    [
        *("Answer: A and B", "The answer is A and C.", "Answer: A/B", "Answer: A & B", r"\boxed{(A)(B)(C)(D)}"),
        *(r"\boxed{B) or C)}", r"\boxed{A} or \boxed{B}", "Answer: (A) or (B)", "Answer: A, possibly B"),
        *(
            "Answer: A. 5 or B. 7",
            "Answer: A; B",
            "The answer is A (or B).",
            r"\boxed{A \text{ and } C}",
            "Answer: A+B",
        ),
    ],
)
def test_an_answer_that_names_several_letters_names_none(judges: Judges, answer: str) -> None:
    for letter in "ABCD":
        assert not is_right(judges["choice"], letter, answer)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is A, not B.", "A"),
        ("Answer: B. C is wrong.", "B"),
        (r"\boxed{D) Both (A) and (B)}", "D"),
        ("Answer: C) Vitamin C", "C"),
        (r"\boxed{A}, as I said: \boxed{A}", "A"),
    ],
)
def test_a_letter_beside_the_answer_is_no_second_answer(judges: Judges, answer: str, letter: str) -> None:
    assert is_right(judges["choice"], letter, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *((SEVEN, form) for form in (r"\(3*7+5\)", "<answer>3*7+5</answer>", r"\boxed{26 = 3*7+5}", "$$3*7+5$$")),
        *((SEVEN, form) for form in (r"\boxed{3*7+5 = 26.0}", r"\boxed{3*7+5 = 21+5 = 26}", "The answer is [3*7]+5.")),
        *((TWELVE, f"\\boxed{{{form}}}") for form in (r"\frac{12}{3}+2", r"\dfrac{12}{3} + 2", r"12\div{3}+2")),
    ],
)
def test_countdown_expressions_may_be_written_in_latex_and_tags(judges: Judges, question: str, answer: str) -> None:
    assert is_right(judges["countdown"], "-", answer, question)
    assert not is_right(judges["countdown"], "-", answer.replace("5", "4").replace("12", "13"), question)


@pytest.mark.parametrize(
    "rule",
    [
        "You do not have to use all the numbers, but each at most once.",
        *("Not every number must be used.", "You don't need to use all numbers.", "You may use all of the numbers."),
        *("It is allowed without using every number.", "Use some or all of the numbers."),
    ],
)
def test_a_question_may_deny_that_all_numbers_are_wanted(judges: Judges, rule: str) -> None:
    assert is_right(judges["countdown"], "26", r"\boxed{3*7+5}", f"{SOME} {rule}")
    assert read_task(f"{SOME} {rule}") == CountdownTask((3, 5, 7, 100), 26, use_all=False)


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("Using the numbers 1,000 and 25, write an expression that equals 1025.", ((1000, 25), 1025)),
        ("Numbers: [3, 5, 7]\nTarget: 26", ((3, 5, 7), 26)),
        ("NUMBERS = (100,200,3); TARGET = 303", ((100, 200, 3), 303)),
        (
            "Using the numbers 3, 5, and 7, reach the target 26.0, such as <answer> (1 + 2) / 3 </answer>.",
            ((3, 5, 7), 26),
        ),
    ],
)
def test_numbers_of_a_question_are_read_in_their_usual_forms(question: str, task: tuple[tuple[int, ...], int]) -> None:
    assert read_task(question) == CountdownTask(*task, use_all=False)


@pytest.mark.parametrize(
    "question",
    [
        "Using the numbers 3, 5, 7, write an expression that equals 2.5.",
        "Using the numbers 3, 5, 7, write an expression that equals -2.",
        "Using the numbers 2.5, 5, 7, write an expression that equals 26.",
        "Using the numbers 3,500,7, write an expression that equals 26.",
        "Using the numbers 3, 5, 7, write an expression that equals 26 in 2 steps.",
        "Using the numbers 3, 5, 7, write an expression that equals 26 or equals 27.",
        f"{SOME} Use each number once.",
        f"{SOME} Use each number at most once. Use all of the numbers.",
        f"{SOME} Use all the numbers and do not forget one.",
    ],
)
def test_a_guess_that_is_not_sure_is_refused(judges: Judges, question: str) -> None:
    problem = Problem("p", question, "26")
    with pytest.raises(ValueError, match=r"problem p: its question does not state .* columns numbers, target, use_all"):
        judges["countdown"].check(problem)
    assert judges["countdown"].verdict(problem, r"\boxed{7-5}").reason == "unreadable question"


def test_a_task_in_the_columns_goes_before_the_questions_wording(judges: Judges) -> None:
    task = CountdownTask((3, 5), 15, use_all=True)
    assert is_right(judges["countdown"], task.question, r"\boxed{3*5}", SOME)
    assert not is_right(judges["countdown"], task.question, r"\boxed{3*7+5}", SOME)
    assert asks_for_all("Reach it.") is False


@pytest.mark.parametrize(
    "piece",
    ["0", "1 ", "\\boxed{", "\\boxed{5} ", "`", "*a ", "$1", "1=", "A, ", "3 cm ", "\\frac{1}{2}", "answer is "],
)
def test_a_model_that_repeats_itself_costs_no_time(judges: Judges, piece: str) -> None:
    text, before = piece * (20_000 // len(piece)), time.process_time()
    for kind, judge in judges.items():
        judge.verdict(Problem("p", SEVEN, "B" if kind == "choice" else "73"), text)
    assert time.process_time() - before < 3.0  # 0.1 s each; a pattern of quadratic cost takes a minute
