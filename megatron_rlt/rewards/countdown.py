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
_NUMBERS = re.compile(r"\bnumbers:?\s*[\[(]?((?:\d+(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s+)?)+)")
_TARGET = re.compile(r"\b(?:equals?|reach(?:es)?|makes?|gets?|target:?(?: of| is)?)\s+(\d+)\b")
_USE_ALL = re.compile(r"\bexactly once\b|\ball (?:the |of the )?numbers\b|\bevery number\b")

_SIGNS = (
    *((sign, "*") for sign in (r"\times", r"\cdot", "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}")),
    *((sign, "/") for sign in (r"\div", "\N{DIVISION SIGN}")),
    ("\N{MINUS SIGN}", "-"),
    (r"\left", ""),
    (r"\right", ""),
)


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
    """The task of a question; None if it does not state "numbers 1, 2, 3" and "equals 6" (or reach, make, target).

    Numbers may stand in brackets. "exactly once", "all numbers" and "every number" ask for all of them.
    """
    numbers, target = _NUMBERS.search(question), _TARGET.search(question)
    if numbers is None or target is None:
        return None
    given = tuple(int(number) for number in re.findall(r"\d+", numbers.group(1)))
    return CountdownTask(given, int(target.group(1)), use_all=_USE_ALL.search(question) is not None)


def expression_of(text: str) -> str:
    r"""The expression an answer ends with: its last \boxed{}, else its last line without "Answer:" and signs of markup.

    Products and quotients written as \times, \cdot, \div, × or ÷ become * and /.
    """
    box = last_boxed(text)
    lines = [line for line in text.splitlines() if line.strip()]
    expression = box if box is not None else lines[-1].rpartition(":")[2] if lines else ""
    for sign, plain in _SIGNS:
        expression = expression.replace(sign, plain)
    return expression.strip("$`*. \t")


def why_wrong(expression: str, task: CountdownTask) -> str | None:
    """None for a right expression, else the first of these that it breaks.

    "not an expression": something other than whole numbers, + - * / between two terms, and parentheses, or too long;
    "other numbers": a number that was not given, or used too often (or, where all are wanted, left out);
    "division by zero"; "wrong value": not the target, or an "= x" behind the expression that names another one.
    """
    formula, _, claimed = expression.partition("=")
    tree = _parse(formula)
    if tree is None:
        return "not an expression"
    if not _uses_given(tree, task):
        return "other numbers"
    try:
        value = _value(tree)
    except ZeroDivisionError:
        return "division by zero"
    right = value == task.target and claimed.strip() in ("", str(task.target))
    return None if right else "wrong value"


def _parse(formula: str) -> ast.expr | None:
    # The signs are checked first: Python would also read names, calls, tuples and powers.
    if len(formula) > MAX_EXPRESSION_CHARACTERS or not re.fullmatch(r"[\d\s+\-*/()]+", formula):
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
