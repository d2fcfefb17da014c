"""The documentation as data: pages, their code blocks, and the words they set in `code`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"
GENERATED = ("reference/configuration.md", "reference/commands.md")

_BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """One block of code."""

    page: str
    line: int  # of the first line inside, from 1
    language: str
    text: str
    note: str  # of the comment before it; empty without one

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run: ")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    """All pages that people wrote, relative to `docs/`."""
    names = (page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md"))
    return sorted(name for name in names if name not in GENERATED)


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of one language on a page, in order."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["note"] or "")
        for found in _BLOCK.finditer(text)
        if found["language"] == language
    ]


def code_words(page: str) -> list[str]:
    """What stands in single backticks outside blocks, each once."""
    text = _BLOCK.sub("", (PAGES / page).read_text(encoding="utf-8"))
    return sorted(set(_CODE.findall(text)))
