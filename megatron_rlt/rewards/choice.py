r"""The letter that an answer to a multiple-choice question names.

In: the text where the answer stands. Out: one capital letter A to Z, or None. Whether it is the right one, and
whether the question offers it at all, is the caller's comparison.
"""

from __future__ import annotations

import re
import unicodedata

from megatron_rlt.rewards.answers import last_boxed

# `A` and `I` before a small word are mostly words: "the answer is a matter of ...", "the answer I found".
_NO_WORD = r"(?![A-Za-z0-9'\u2019])(?!\s+(?!(?:because|since|as|for|and)\b)[a-z])"
_STATED = re.compile(
    r"(?:(?i:\b(?:answer|correct (?:choice|option)))(?i:[^\w.\n]+(?:is|(?:would|must|should) be)\b)?|答案[是为為]?)"
    rf"[^\w.\n]*(?i:(?:option|choice)\b[^\w.\n]*)?(?:([A-Z]){_NO_WORD}|(?<=\()([a-z])(?=\)))"
)
_MARKUP = re.compile(r"\\[A-Za-z]+|[\\${}*_`]")
_NAMED = r"(?:(?i:option|choice)\b)?"
_ALONE = re.compile(rf"\W*{_NAMED}\W*([A-Za-z])\W*")
_LABEL = re.compile(rf"[\s(\[]*{_NAMED}[\s(\[]*([A-Z])\s*[).:\]]")
# A second letter that is named with the first: "A and B", "A/B", "A, possibly B", "(A)(B)", "A) 5 or B) 6".
_BESIDE = re.compile(
    rf"[^\w\n]*(?:\b(?:and|or|maybe|possibly|perhaps|also|even|both|either|plus|but|to)\b[^\w\n]*)*([A-Z]){_NO_WORD}"
)
_LABELLED = re.compile(r"(?:\b(?:and|or)\b|[,;/&+|])\s*[(\[]?([A-Z])\s*(?:[)\]]|[.:]\s*\w)|[(\[]([A-Z])[)\]]")
# A choice may speak of others: "D) Both (A) and (B)".
_OF_OTHERS = re.compile(r"(?i)\W*(?:both|all|neither|none|only|either)\b")


def choice_letter(text: str) -> str | None:
    r"""The letter an answer names, by the first rule that applies; None if it names none, or several at once.

    1. The last \boxed{}, if there is one, holds a letter alone or as a label: `B`, `(b)`, `Option B`, `B) 12 m`.
    2. The last statement of the form "answer: B", "the answer is (b)", "correct option is B", "答案是B"; the letter is
       a capital or in parentheses.
    3. The last line that is not blank holds a letter alone or as a label.
    """
    text = unicodedata.normalize("NFKC", text)
    box = last_boxed(text)
    if box is not None:
        return _letter_of(box)
    plain = _MARKUP.sub("", text)
    stated = list(_STATED.finditer(plain))
    if stated:
        return _single(stated[-1][1] or stated[-1][2].upper(), plain[stated[-1].end() :].partition("\n")[0])
    lines = [line for line in text.splitlines() if line.strip()]
    return _letter_of(lines[-1]) if lines else None


def _letter_of(text: str) -> str | None:
    plain = _MARKUP.sub("", text)
    alone, label = _ALONE.fullmatch(plain), _LABEL.match(plain)
    if alone:
        return alone[1].upper()
    return _single(label[1], plain[label.end() :]) if label else None


def _single(letter: str, rest: str) -> str | None:
    """The letter, unless the rest of its line names another one as well."""
    beside = _BESIDE.match(rest)
    others = [] if _OF_OTHERS.match(rest) else [found[1] or found[2] for found in _LABELLED.finditer(rest)]
    if beside:
        others.append(beside[1])
    return letter if all(other == letter for other in others) else None
