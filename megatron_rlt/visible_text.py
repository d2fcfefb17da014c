"""What a text shows: whether anything at all, and as one line in which no character acts on the terminal.

White space, format characters and blanks that count as letters show nothing.
"""

from __future__ import annotations

import unicodedata

# Zero-width and other format characters (BOM, soft hyphen, direction marks), controls, separators, and marks, which
# need a character to combine with.
_INVISIBLE = frozenset({"Cf", "Cc", "Zs", "Zl", "Zp", "Mn", "Me"})
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # Hangul fillers and the empty Braille cell

# Controls, line breaks, characters that turn the direction of writing, and halves of characters.
_ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def one_line(text: str) -> str:
    """A text as one line, whatever it quotes: characters that would break or overwrite the line are escaped."""
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode() if unicodedata.category(one) in _ACTING else one for one in text
    )


def is_blank(text: str) -> bool:
    """Whether every character of a text is invisible; true for an empty one."""
    return all(character in _BLANK or unicodedata.category(character) in _INVISIBLE for character in text)
