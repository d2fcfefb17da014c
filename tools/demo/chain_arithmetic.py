"""The demo's task: chain arithmetic modulo 7, with one noisy explanation a question, and a judge of explanations.

A question such as `5 +5 *5 *6 +4` is worked from left to right modulo 7; its solution is one digit. The training
explanations are mostly bad on purpose: few work out all steps, half state the solution with hardly a step. A
teacher that is rewarded for making the solution predictable by plausible steps should write careful ones more often.
Nothing here knows the trainer; explanations are recognised from their text alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import StrEnum

MODULUS = 7
NUM_OPERATIONS = 4
OPERATIONS = tuple(f"+{n}" for n in range(1, MODULUS)) + tuple(f"*{n}" for n in range(2, MODULUS))

OPENERS = ("ok , ", "well , ", "let us see . ", "first , ", "")
FILLERS = (
    "the weather is nice today .",
    "i would like some coffee .",
    "numbers can be fun .",
    "this one looks hard .",
    "let us think about it again .",
    "my cat sleeps on a chair .",
    "we could try another way .",
    "please wait for a moment .",
)


class Style(StrEnum):
    """What an explanation turns out to be when it is read."""

    CAREFUL = "careful"  # every step, every step right
    SLOPPY = "sloppy"  # some step is wrong
    LEAP = "leap"  # states the right answer without all the steps
    WRONG = "wrong"  # states another answer
    RAMBLE = "ramble"  # states no answer and not all the steps


def apply(operation: str, value: int) -> int:
    """One step: `+4` adds, `*6` multiplies, modulo 7."""
    operand = int(operation[1:])
    return (value + operand if operation[0] == "+" else value * operand) % MODULUS


def running_values(question: str) -> list[int]:
    """The value after each operation of `5 +5 *5 ...`; the last one is the solution."""
    start, *operations = question.split()
    values, value = [], int(start)
    for operation in operations:
        value = apply(operation, value)
        values.append(value)
    return values


def solve(question: str) -> str:
    """The solution of a question."""
    return str(running_values(question)[-1])


def draw_questions(rng: random.Random, count: int) -> list[str]:
    """`count` different questions: a digit and four different operations each (55,440 exist)."""
    questions: dict[str, None] = {}
    while len(questions) < count:
        operations = rng.sample(OPERATIONS, NUM_OPERATIONS)
        questions[" ".join((str(rng.randrange(MODULUS)), *operations))] = None
    return list(questions)


def noisy_trace(rng: random.Random, question: str) -> str:
    """One explanation as a careless crowd writes them: careful .20, sloppy .10, hasty .50, rambling .20."""
    write = rng.choices((_careful, _sloppy, _hasty, _ramble), weights=(20, 10, 50, 20))[0]
    return rng.choice(OPENERS) + write(rng, question)


def classify(question: str, explanation: str) -> Style:
    """Recognise an explanation's style from its text.

    A step is an operation with its operand before it and `= value` after it. Steps must follow the question in
    order, each from the value before it; any other use of an operation makes the explanation sloppy.
    """
    words = explanation.split()
    num_steps = _num_right_steps(question, words)
    if num_steps is None:
        return Style.SLOPPY
    answers = [words[at + 3 : at + 4] for at in range(len(words)) if words[at : at + 3] == ["so", "we", "get"]]
    if any(answer != [solve(question)] for answer in answers):
        return Style.WRONG
    if num_steps == len(question.split()) - 1:
        return Style.CAREFUL
    return Style.LEAP if answers else Style.RAMBLE


def _num_right_steps(question: str, words: Sequence[str]) -> int | None:
    """How many steps are worked out; None if one of them is wrong."""
    start, *operations = question.split()
    value, num_steps = int(start), 0
    for at, word in enumerate(words):
        if word not in OPERATIONS:
            continue
        if num_steps == len(operations) or word != operations[num_steps] or at == 0:
            return None
        result = apply(word, value)
        if words[at - 1] != str(value) or list(words[at + 1 : at + 3]) != ["=", str(result)]:
            return None
        value, num_steps = result, num_steps + 1
    return num_steps


def _steps(question: str, values: Sequence[int]) -> str:
    """The first `len(values)` steps with the values they are claimed to give."""
    start, *operations = question.split()
    claims = [f"{operation} = {value}" for operation, value in zip(operations, values, strict=False)]
    return " ".join((start, *claims, ";"))


def _conclusion(question: str) -> str:
    return f" so we get {solve(question)} ."


def _careful(rng: random.Random, question: str) -> str:
    return _steps(question, running_values(question)) + _conclusion(question) * rng.randrange(2)


def _sloppy(rng: random.Random, question: str) -> str:
    """One or two steps are wrong and the error is carried on; half conclude with the right answer nevertheless."""
    start, *operations = question.split()
    wrong_steps = rng.sample(range(len(operations)), rng.randint(1, 2))
    values, value = [], int(start)
    for step, operation in enumerate(operations):
        value = apply(operation, value)
        if step in wrong_steps:
            value = (value + rng.randrange(1, MODULUS)) % MODULUS
        values.append(value)
    return _steps(question, values) + _conclusion(question) * rng.randrange(2)


def _hasty(rng: random.Random, question: str) -> str:
    """No step (one in five) or one step, then the answer: a copy of the solution."""
    step = "" if rng.random() < 0.2 else _steps(question, running_values(question)[:1])
    return (step + _conclusion(question)).strip()


def _ramble(rng: random.Random, question: str) -> str:
    fillers = " ".join(rng.sample(FILLERS, rng.randint(1, 3)))
    return fillers + _conclusion(question) * rng.randrange(2)
