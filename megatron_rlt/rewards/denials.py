"""What prose denies is no answer: of "42, not 41" the first counts, of "it is not 42" nothing.

In: prose in the notation of `notation.common_notation`, without a box. Out: the part of it that states a value. The
words are English.
"""

from __future__ import annotations

import re

_VALUE = r"[\\$({\s-]*\d"
_DENIED = re.compile(
    r"(?i)\b(?:not|never|cannot|neither|nor|wrong|incorrect|rather than|instead of)\b|n['\u2019]t\b"
    r"|\b(?:more|less|fewer|greater|smaller|larger|higher|lower|other) than"
    rf"{_VALUE}|\b(?:at least|at most|between){_VALUE}|\d\W*\sor\s{_VALUE}"
)
_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)|\n+")
# Commas of a point or a list in brackets part no clauses.
_CLAUSE_END = re.compile(
    r"[,;]\s+(?![^(\[{]*[)\]}])|\b(?=(?:rather than|instead of|and not)\b)|\b(?:but|so|since|because)\b"
)


def stated_part(prose: str) -> str | None:
    """Of the last sentence with a number: the last clause whose number is not denied, None if each is.

    Prose whose last such sentence denies nothing comes back as it is.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(prose) if re.search(r"\d", sentence)]
    if not sentences or not _DENIED.search(sentences[-1]):
        return prose
    clauses = [clause for clause in _CLAUSE_END.split(sentences[-1]) if re.search(r"\d", clause)]
    return next((clause for clause in reversed(clauses) if not _DENIED.search(clause)), None)
