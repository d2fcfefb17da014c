"""What a text is read as before math-verify sees it."""

from __future__ import annotations

import pytest

from megatron_rlt.rewards.notation import common_notation, read_whole, statements


def read(text: str) -> str | None:
    reading = read_whole(next(statements(common_notation(text))))
    return None if reading is None else reading.latex


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        (" 1/2 ", "1/2"),
        (r"\frac{1}{2} \text{of the cake}", r"\frac{1}{2}"),
        ("2 sin x", r"2 \sin x"),
        ("16 pi", r"16 \pi"),
        ("ln(3)", r"\ln (3)"),
        ("x**10", "x^{10}"),
        ("minus 7", "-7"),
        (r"\varnothing", r"\emptyset"),
        (r"\textbf{(C)}\ 12", "12"),
        ("(C) \\cap (D)", r"(C) \cap (D)"),
        ("1,000, 2,000", "1000, 2000"),
        ("(1,000, 5)", "(1000, 5)"),
        ("1,000", "1,000"),
        ("100,200", "100,200"),
        ("30 mph", "30"),
        ("9.8 N", "9.8"),
        ("2N", "2N"),
        (r"5\,\Omega", "5"),
        ("答案是42。", "42"),
        ("一共有42个", None),
        ("Ответ 42", None),
        ("是", r"\text{是}"),
        ("I do not think it is 42", None),
        (r"\$32,\!348", "32,348"),
        ("4 cm", "4"),
        (r"\boxed{5}", "5"),
        ("$5$", "5"),
        ("about 5", None),
    ],
)
def test_the_whole_of_bare_mathematics_is_read_or_nothing(text: str, read_as: str | None) -> None:
    assert read(text) == read_as
