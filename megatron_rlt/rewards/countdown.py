r"""Countdown: reach a target from given numbers by + - * /, checked by exact arithmetic.

In: a question's text and an answer's text. Out: the task, and why an answer fails, if it does. Problems are drawn in
`countdown_problems`.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from megatron_rlt.rewards.answers import last_boxed

# Far more than any answer needs, and little enough that neither the parser nor the recursion below runs deep.
MAX_EXPRESSION_CHARACTERS = 300
_NUMBER = r"-?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?"
_AND = r"(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s+)"
_NUMBERS = re.compile(
    rf"\bnumbers?(?:\s+(?:are|given))?\s*[:=]?\s*(?:[\[({{]([\d\s,.-]+)[\])}}]|({_NUMBER}(?:{_AND}{_NUMBER})*))",
    re.IGNORECASE,
)
_TARGET = re.compile(
    r"\b(?:equals?|equal to|reach(?:es)?|makes?|gets?|target(?:\s+(?:number|value))?)"
    rf"(?:\s*[:=]|\s+(?:of|is|the target|to))*\s+({_NUMBER})\b",
    re.IGNORECASE,
)
_ALL = re.compile(r"(?i)\bexactly once\b|\ball\s+(?:\w+\s+){0,3}numbers\b|\bevery\s+(?:\w+\s+)?number\b")
_SOME = re.compile(r"(?i)\bat most once\b|\bsome of\b")
_NEED_NOT = re.compile(
    r"(?i)(?:\bnot|n['’]t|\bno need|\bwithout)\W+(?:\w+\W+){0,4}?(?:all|every|each)\b"
    r"|\b(?:may|can|could)\W+(?:\w+\W+){0,2}?(?:all|every)\b|\b(?:any|some) or all\b"
)
_DENIAL = re.compile(r"(?i)\bnot\b|n['’]t\b|\bnever\b|\bwithout\b")
# "Each number once": exactly, or at most?
_ONCE = re.compile(r"(?i)^(?!.*\b(?:only|most|more than)\b).*\beach\b.*\bonce\b")
# What a question shows of the form of an answer is no part of its task.
_SHOWN = re.compile(r"<(\w+)>[^<]*</\1>|\b(?:for example|e\.g\.|such as)[^\n]*", re.IGNORECASE)
_SIGNS = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:left|right|displaystyle|text|mathrm|[,;:! ]|(?=[{}]))|\\[()\[\]]|</?\w+>|[$`*]{2,}|[$`]", ""),
        (r"\\times|\\cdot|\\ast|[×·∗⋅]", "*"),
        (r"\\div|[÷∕]", "/"),
        ("[\N{MINUS SIGN}\N{EN DASH}]", "-"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"(?<=[\d)])\s*[xX]\s*(?=[\d(])", "*"),
    )
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class CountdownTask:
    """What a question asks for."""

    numbers: tuple[int, ...]
    target: int
    use_all: bool  # every number exactly once; otherwise each at most once

    @property
    def question(self) -> str:
        """The task in words, such that `read_task` gives it back."""
        rule = "each number exactly once" if self.use_all else "each number at most once"
        numbers = ", ".join(str(number) for number in self.numbers)
        return (
            f"Using the numbers {numbers}, write an expression that equals {self.target}."
            f" Use only + - * / and parentheses, and {rule}."
        )


def read_task(question: str) -> CountdownTask | None:
    """The task of a question; None if it does not surely state "numbers 1, 2" and "equals 3" (or reach, make, target).

    Numbers may stand in brackets. Not sure are fractions and signs, `1,000` where commas may separate numbers, numbers
    that belong neither to the list nor to the target, and what `asks_for_all` finds contradictory.
    """
    text = _SHOWN.sub(" ", question)
    numbers, targets = _NUMBERS.search(text), _TARGET.findall(text)
    if numbers is None or len(set(targets)) != 1:
        return None
    bracketed, listed = numbers.groups()
    given = re.findall(r"[^\s,]+" if bracketed else _NUMBER, bracketed or listed)
    ambiguous = not bracketed and "," in "".join(given) and (len(given) == 1 or re.search(r"\d,(?!\d{3}\b)\d", listed))
    rest = _TARGET.sub(" ", text.replace(numbers[0], " numbers ", 1))
    use_all = asks_for_all(rest)
    values = [_whole_number(number) for number in (*given, targets[0])]
    if ambiguous or use_all is None or None in values or re.search(r"\d", rest):
        return None
    *whole, target = (value for value in values if value is not None)
    return CountdownTask(tuple(whole), target, use_all)


def asks_for_all(question: str) -> bool | None:
    """Whether a question wants every number used, which it says by "exactly once", "all numbers" or "every number".

    False if it says nothing, or that they need not be used; None if that is not sure.
    """
    said: set[bool | None] = set()
    for clause in re.split(r"[.,;:!?\n]|\bbut\b", question):
        if _ALL.search(clause):
            said.add(False if _NEED_NOT.search(clause) else None if _DENIAL.search(clause) else True)
        elif _SOME.search(clause):
            said.add(False)
        elif _ONCE.search(clause):
            said.add(None)
    return None if len(said) > 1 else said.pop() if said else False


def _whole_number(text: str) -> int | None:
    plain = re.fullmatch(r"(0|[1-9]\d*)(?:\.0+)?", text.replace(",", ""))
    return int(plain[1]) if plain else None


def expression_of(text: str) -> str:
    r"""The expression an answer ends with: its last \boxed{}, else its last line without "Answer:" and signs of markup.

    \times, \cdot, \div, \frac, ×, ÷ and brackets other than parentheses come back as * / and parentheses.
    """
    box = last_boxed(text)
    lines = [line for line in text.splitlines() if line.strip()]
    stated = box if box is not None else lines[-1].rpartition(":")[2] if lines else ""
    expression = re.sub(r"^[A-Za-z][^\d(\[{\\$`*]*+(?=.*\d)", "", stated.strip()) if box is None else stated
    while (plain := _FRACTION.sub(r"((\1)/(\2))", expression)) != expression:
        expression = plain
    for pattern, sign in _SIGNS:
        expression = pattern.sub(sign, expression)
    return expression.translate(str.maketrans("[]{}", "()()")).strip("*. \t")


def why_wrong(expression: str, task: CountdownTask) -> str | None:
    """None for a right expression, else the first of these that it breaks.

    "not an expression": something other than whole numbers, + - * / between two terms, and parentheses, or too long;
    "other numbers": a number that was not given, or used too often (or, where all are wanted, left out);
    "division by zero"; "wrong value": not the target, or something beside it behind an equals sign that is not, either.
    """
    sides = expression.split("=") if len(expression) <= MAX_EXPRESSION_CHARACTERS else [""]
    formula = next((side for side in sides if (tree := _parse(side)) and _uses_given(tree, task)), sides[0])
    tree = _parse(formula)
    if tree is None:
        return "not an expression"
    if not _uses_given(tree, task):
        return "other numbers"
    sides.remove(formula)
    try:
        right = _value(tree) == task.target and all(_claimed(side) == task.target for side in sides)
    except ZeroDivisionError:
        return "division by zero"
    return None if right else "wrong value"


def _claimed(side: str) -> Fraction | None:
    """The value of a side that need not use the given numbers; None if it has none."""
    if re.fullmatch(r"\s*\d{1,20}\.\d{1,20}\s*", side):
        return Fraction(side.strip())
    tree = _parse(side)
    return None if tree is None else _value(tree)


def _parse(formula: str) -> ast.expr | None:
    # The signs are checked first: Python would also read names, calls, tuples and powers.
    if not re.fullmatch(r"[\d\s+\-*/()]+", formula):
        return None
    try:
        tree = ast.parse(" ".join(formula.split()), mode="eval").body
    except SyntaxError:
        return None
    return tree if _is_arithmetic(tree) else None


def _is_arithmetic(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        known = isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div)
        return known and _is_arithmetic(node.left) and _is_arithmetic(node.right)
    return isinstance(node, ast.Constant)


def _uses_given(tree: ast.expr, task: CountdownTask) -> bool:
    used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    given = Counter(task.numbers)
    return used == given if task.use_all else used <= given


def _value(node: ast.expr) -> Fraction:
    if not isinstance(node, ast.BinOp):
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return Fraction(node.value)
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right
