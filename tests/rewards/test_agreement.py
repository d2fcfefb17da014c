"""The published agreement with verdicts by hand."""

from __future__ import annotations

from tools.docs.page import PAGES
from tools.verdicts import PAIRS, agreement_table


def test_the_page_shows_how_often_verdicts_agree_with_those_by_hand() -> None:
    assert len(set(PAIRS.read_text(encoding="utf-8").splitlines())) >= 300
    assert agreement_table() in (PAGES / "verdicts.md").read_text(encoding="utf-8"), (
        "put what `python -m tools.verdicts` prints into docs/verdicts.md"
    )
