r"""One notation for mathematics that people and models write in many, put on before math-verify reads it.

In: the text of an answer or a reference. Out: the same as bare LaTeX and its units, or nothing where a part of the
text is neither mathematics nor a known way to state it. Nothing is compared here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from megatron_rlt.rewards.answers import joined_box
from megatron_rlt.rewards.units import Unit, latex_fraction, without_units

_SIGNS = {
    **{"×": r"\times", "÷": r"\div", "·": r"\cdot", "∞": r"\infty", "π": r"\pi", "≤": r"\le", "≥": r"\ge"},
    **{"≠": r"\ne", "±": r"\pm", "∪": r"\cup", "∩": r"\cap", "∅": r"\emptyset", "∈": r"\in", "≈": r"\approx"},
    **{"−": "-", "–": "-", "°": r"^\circ", "℃": r"^\circ C", "。": "."},
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n", strict=True))
_MONEY = {"€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee", r"\$": "dollar", "¢": "cent"}
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASE = rf"(\d+|{'|'.join(_BASES)})"
_TEXT = r"\\(?:text(?:bf|rm|it|normal)?|math(?:rm|bf)|mbox|operatorname)\s*"
_AMOUNT = r"((?<![\d.,])\d(?:[\d.,]{0,30}\d)?(?:\\cdot 10\^\{\d\})?)"
# Where ", " and "and" part numbers, a comma between digits groups them.
_GROUPED = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d.]|,\d)"
_LISTED = re.compile(r"[\d)}]\s*(?:,\s+|;\s*|\s(?:and|or)\s)")
# Words as formulas write them.
_CONSTANT = r"(?<![A-Za-z\\])pi(?![A-Za-z])"
_FUNCTION = r"(?<![A-Za-z\\])(ln|log|sin|cos|tan|exp)\s*(?=[\d(]|(?<=\s)[a-z]\b)"
# Cyrillic to Thai, and from Japanese to Korean: letters of words alone, in some without a space before a number.
_LETTERS = "\u0400-\u0e7f\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"


def _value_in_base(found: re.Match[str]) -> str:
    """`1011_2` as the number it is; unchanged where that base has no such digit."""
    base = next(group for group in found.groups()[1:] if group)
    try:
        return str(int(found[1], int(base) if base.isdecimal() else _BASES.index(base) + 2))
    except ValueError:
        return found[0]


def _repeating(found: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction."""
    fixed, repeated = found[1] + found[2], found[3]
    value = Fraction(int(fixed + repeated) - int(fixed or 0), 10 ** len(found[2]) * (10 ** len(repeated) - 1))
    return latex_fraction(value)


# In this order. People read what comes out as what they wrote.
_REWRITTEN = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([\d.]*\d|\w))", r"\\sqrt{\1\2\3}"),
        (
            r"(?<![\w)}*_`])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*_`])(.{0,200}?[^\s*_`])\1(?![\w({])",
            r"\2",
        ),  # Markdown's emphasis
        (r"(?<!\\)\$(?=\d)(?![^$\n]*[^\s$\\]\$(?!\d))", r"\\$"),  # a price: no formula ends behind it
        (r"(?<=[\w)}])\s?\*\*\s?(-?\d+|[a-z]\b)", r"^{\1}"),  # Python's power
        (r"\\!|\\displaystyle\b|\\approx\s*(?=[\d-])", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad\b)|~", " "),
        (_GROUPED, lambda found: found[0].replace(",", "") if _LISTED.search(found.string) else found[0]),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![.,]?\d)", lambda found: found[0].replace(" ", "")),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]\+?(-?\d+)(?!\.?\w)", r"\1\\times 10^{\2}"),
        (r"(?<!\d)(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*\{(\d{1,20})\}", _repeating),
        (r"(?<![\d/.])(\d+) (\d+)/(\d+)(?![\d/.])", r"\1\\frac{\2}{\3}"),
        (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<=10)\^\+?(-?\d+)", r"^{\1}"),
        (
            rf"\b(\d[\dA-F]*)(?:_(\d+)|_\{{{_BASE}\}}|_\{{\\text\{{(?:base )?{_BASE}\}}\}}"
            rf"|\s+\(?base {_BASE}\b\)?|\s*\\text\{{\s*\(?base {_BASE}\)?\s*\}})",
            _value_in_base,
        ),
        (rf"(\d)\s+({'|'.join(_ZEROS)})\b", lambda found: rf"{found[1]}\cdot 10^{{{_ZEROS[found[2]]}}}"),
        (rf"([€£¥₹¢]|\\\$)\s*{_AMOUNT}", lambda found: f"{found[2]} {_MONEY[found[1]]}"),
        (rf"{_AMOUNT}\s*([€£¥₹¢]|\\\$)", lambda found: f"{found[1]} {_MONEY[found[2]]}"),
        (r"\s?\^\s?(?:\{\s*\\circ\s*\}|\\circ\b)", " degree "),
        (rf"degrees?\s*(?:{_TEXT}\{{\s*([CF])\s*\}}|([CF])(?:elsius|ahrenheit)?\b)", r"deg\1\2"),
        (r"(?i)\b([ap])\.m\.?", r"\1m"),
        (r"(?<![\d:])(\d{1,2}):([0-5]\d)(?![\d:])", r"\1+\\frac{\2}{60}"),  # hours and minutes
        (rf"\s?(?:{_TEXT}\{{\s*(?i:per\s?cent(?:age)?)\s*\}}|(?i:\bper\s?cent(?:age)?\b))", r"\\%"),
        (r"(?<!\\)\binfinity\b", r"\\infty "),
        (r"\\varnothing\b", r"\\emptyset "),
        (_CONSTANT, r"\\pi "),
        (_FUNCTION, r"\\\1 "),
        (r"(?i)(?<![\w}])(?:minus|negative)\s+(?=[\d$]|\\[df]?frac|\\sqrt)", "-"),
        (r"\bmph\b", "mi/h"),
        (r"\b(?:kmh|kph|kmph)\b", "km/h"),
        (r"(?<=[\d}])\s*(?:Ω|\\Omega\b)", " ohm"),
        (rf"(?<=[{_LETTERS}])(?=[\w\\$(-])(?![{_LETTERS}])|(?<=[\w)}}$])(?<![{_LETTERS}])(?=[{_LETTERS}])", " "),
    )
)
# A text as long as this is prose; the patterns below take quadratic time.
_MAX_STATEMENT_CHARACTERS = 2000
_MARKER = re.compile(r"(?i)\banswer(?:\s*(?:\bis\b|:|=))+|####|(?:答案|答)\s?[是为為:]+")
# Before the value of a choice: "(C) 12".
_LABEL = re.compile(r"^\(?[A-H]\)\s+(?=-?(?:\d|\.\d|\\(?:[dt]?frac|sqrt|pi)\b))")
_LEAD = re.compile(
    r"^(?!\D*(?:\b(?:not|never|cannot)\b|n['\u2019]t\b))[A-Za-z][^\d\\$=+(){}]*?(?:\s(?:is|are|equals)\b|:)\s*"
)
_DELIMITERS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_FUNCTIONS = [
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "log",
    "ln",
    "exp",
    "sqrt",
    "pi",
    "gcd",
    "lcm",
    "min",
    "max",
    "mod",
    "frac",
    "and",
    "or",
]
# Words that change what a number means, so that they are never mere nouns behind it.
_CHANGING = (
    "and|or|by|to|not|no|nor|than|more|less|least|most|between|from|times|minus|plus|over|half|third|quarter|dozen"
    "|trillion|remainder|mod|squared|cubed|degrees?|if|when|where|otherwise|except|infinitely|because|since|as|is|are"
)
_NOUNS = re.compile(rf"(?<=[\d)}}!])(?:\s+(?!(?:{_CHANGING})\b)[A-Za-z][a-z'-]*[a-z])+(?=\s*(?:$|[,;]|and\b|or\b))")
_WORD = re.compile(
    rf"(?<![A-Za-z\\])(?!(?:{'|'.join(_FUNCTIONS)})(?![A-Za-z]))"
    r"(?:(?=[a-z]*[aeiou])[a-z]{3,}|no|is|if|to|in|of|it|we|so|as|at|by|an|on|do)(?![a-z])",
    re.IGNORECASE,
)
_FOREIGN = re.compile(rf"[{_LETTERS}]+")
_NOTHING = re.compile(r"(?:[Nn]ot?|[Dd]oes not)(?: [a-z]+){1,2}")
_COMMANDS = re.compile(rf"(?:{_TEXT}|\\(?:begin|end)\s*)\{{[^{{}}]*\}}|\\[A-Za-z]+")


@dataclass(frozen=True)
class Reading:
    """What a text says, all of it."""

    latex: str  # without delimiters
    unit: Unit | None


def statements(text: str) -> Iterator[str]:
    r"""What a text states, as it can be read: its last \boxed{}; what follows "answer is", "answer:" or "####"; all.

    The first is the whole of what counts. Those after it are parts, from which an answer may be read, too.
    """
    box = joined_box(text)
    if box is not None:
        yield box
        return
    *_, rest = _MARKER.split(text)
    yield rest
    lines = [line for line in rest.splitlines() if line.strip()] or [""]
    yield re.split(r"\.\s", lines[0])[0] if rest != text else lines[-1]


def common_notation(text: str) -> str:
    """The text with signs, spaces, numbers and emphasis of other notations in LaTeX; prose stays."""
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, f"{latex} " if latex[-1].isalpha() else latex)
    raised = f"[{''.join(_RAISED)}]+"
    text = re.sub(raised, lambda found: f"^{{{''.join(_RAISED[sign] for sign in found[0])}}}", text)
    text = re.sub(
        "[¼-¾⅐-⅞]", lambda found: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", found[0]).split("⁄")), text
    )
    text = unicodedata.normalize("NFKC", text)
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


def read_whole(statement: str) -> Reading | None:
    """A statement in `common_notation` as LaTeX; None if a part of it is no mathematics."""
    if len(statement) > _MAX_STATEMENT_CHARACTERS:
        return None
    text = _DELIMITERS.sub("", statement).strip().rstrip(".,;:").strip()
    if re.search(r"\d", text):
        text = re.sub(rf"{_TEXT}\{{([^{{}}]*)\}}", r" \1 ", text).strip().rstrip(".,;:")
    if any(words.fullmatch(text) for words in (_WORD, _NOTHING, _FOREIGN)):
        return Reading(f"\\text{{{text}}}", None)
    text = _LABEL.sub("", _LEAD.sub("", text))
    text, unit = without_units(text)
    text = _NOUNS.sub("", text)
    text = re.sub(r"\s*\bdegrees?\b", r"^\\circ ", text)
    text = re.sub(r"(?<=\d)\s+by\s+(?=\d)", ", ", text).strip()
    plain = _COMMANDS.sub("0", text)
    return None if not text or _WORD.search(plain) or _FOREIGN.search(plain) else Reading(text, unit)
