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
        ("2 sin x", "2 sin x"),
        (r"\$32,\!348", "32,348"),
        ("4 cm", "4"),
        (r"\boxed{5}", "5"),
        ("$5$", "5"),
        ("about 5", None),
    ],
)
def test_the_whole_of_bare_mathematics_is_read_or_nothing(text: str, read_as: str | None) -> None:
    assert read(text) == read_as
