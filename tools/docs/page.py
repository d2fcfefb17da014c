"""Pages of the documentation as files, and text that is safe in a cell of a Markdown table."""

from __future__ import annotations

from html import escape
from itertools import zip_longest
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs"


def cell(text: str) -> str:
    """Text on one line in which nothing outside `code` is taken for a tag, a link or the end of a cell."""
    parts = " ".join(text.split()).split("`")
    plain = [part.replace("<", "&lt;").replace("|", "&#124;").replace("[", "&#91;") for part in parts[::2]]
    code = [_code(part) for part in parts[1::2]]
    return "".join(part for pair in zip_longest(plain, code, fillvalue="") for part in pair)


def _code(text: str) -> str:
    """Readers of Markdown disagree on a bar in backticks in a table: there it is written as HTML."""
    return f"<code>{escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def write_page(page: Path, text: str) -> None:
    """Write a page and say so."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    print(f"Wrote {page.relative_to(PAGES.parent)}")
