"""Whether a text shows anything: white space, format characters and blanks that count as letters show nothing."""

from __future__ import annotations

import unicodedata

# Zero-width and other format characters (BOM, soft hyphen, direction marks), controls, separators, and marks, which
# need a character to combine with.
_INVISIBLE = frozenset({"Cf", "Cc", "Zs", "Zl", "Zp", "Mn", "Me"})
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul fillers and the empty Braille cell


def is_blank(text: str) -> bool:
    """Whether every character of a text is invisible; true for an empty one."""
    return all(character in _BLANK or unicodedata.category(character) in _INVISIBLE for character in text)
