"""Controls for the score of an explanation: what is scored in its place, to compare a score with chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def other_questions(questions: Sequence[str], *, seed: int) -> list[int]:
    """For each question the index of another one, whose explanation it gets.

    All take the one that is the same number of places ahead, which `seed` draws, or the next one after it that is
    another question. So neighbours get neighbours' explanations, and those lie close together on disk.

    Raises:
        ValueError: there are not two different questions.
    """
    num_questions = len(questions)
    if len(set(questions)) < 2:
        raise ValueError(
            f"control=other_question: needs two different questions, and all {num_questions} rows ask the same one;"
            " add rows, or choose another control"
        )
    generator = torch.Generator().manual_seed(seed)
    places = int(torch.randint(1, num_questions, (), generator=generator))
    others = []
    for index, question in enumerate(questions):
        other = (index + places) % num_questions
        while questions[other] == question:
            other = (other + 1) % num_questions
        others.append(other)
    return others


def shuffled(token_ids: Tensor, *, seed: int) -> Tensor:
    """The same ids (`[E]` int64) in an order that `seed` draws: words without their order, length and all."""
    generator = torch.Generator().manual_seed(seed)
    return token_ids[torch.randperm(token_ids.numel(), generator=generator)]


def empty_explanation(token_ids: Tensor) -> Tensor:
    """No ids at all (`[0]` int64): what the student knows without an explanation."""
    return token_ids[:0]
