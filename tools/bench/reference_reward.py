"""The RLT reward as the public reference computes it, for TRL: text in, one sequence at a time, all logits at once.

The completion arrives as decoded text and is encoded again. What stands between two tags, white space included, is
encoded alone and searched for in the tokens of the whole text; where a tag joins the white space next to it, the token
at that edge is left out. Teacher and student each give a whole `[tokens, vocabulary]` log-softmax. What is not copied:
its half-precision sums, searches that may end in the question, its garbage collection after every sample. Runs in the
project's environment and in TRL's: torch alone, with a tokenizer and models of transformers as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardTexts:
    """What stands around one explanation; the pieces are joined as they are."""

    teacher_prompt: str  # up to the tag that opens the explanation
    padding: str  # ends the prompt, after that tag
    end_tag: str  # after the explanation, in the teacher's text
    student_prefix: str  # up to the tag that opens the thought
    bridge: str  # between explanation and solution, in the student's text
    solution: str  # with white space around it
    ending: str  # after the solution


@dataclass(frozen=True)
class RewardSettings:
    """The numbers of the formula."""

    temperature: float
    alpha: float
    lambda_kl: float
    missing_end_tag: float


@dataclass(frozen=True)
class ReferenceReward:
    """Scores decoded completions."""

    tokenizer: Any
    teacher: torch.nn.Module
    student: torch.nn.Module
    settings: RewardSettings

    def rewards(self, completions: Sequence[str], **columns: list[str]) -> list[float]:
        """One reward a completion. TRL passes all columns and more; those of `RewardTexts` are read."""
        names = [field.name for field in fields(RewardTexts)]
        return [
            self.reward(RewardTexts(**{name: columns[name][index] for name in names}), completion)
            for index, completion in enumerate(completions)
        ]

    def reward(self, texts: RewardTexts, completion: str) -> float:
        """r = r_SS - lambda * r_KL + penalty; a missing end tag is punished, appended, and the text is scored."""
        explanation, tag, _ = completion.partition(texts.end_tag)
        thought = f"{texts.padding}{explanation}"
        teacher_ids = self._encode(texts.teacher_prompt + thought + texts.end_tag)
        before_solution = texts.student_prefix + thought + texts.bridge
        student_ids = self._encode(before_solution + texts.solution + texts.ending)
        # The prompt may hold the same words, so each search begins where the piece can begin.
        in_teacher = _find(teacher_ids, self._encode(thought), start=len(self._encode(texts.teacher_prompt)))
        explained = teacher_ids[in_teacher]
        in_student = _find(student_ids, explained, start=len(self._encode(texts.student_prefix)))
        in_solution = _find(student_ids, self._encode(texts.solution), start=len(self._encode(before_solution)))
        teacher = self._logprobs(self.teacher, teacher_ids)
        student = self._logprobs(self.student, student_ids)
        solution = student[_predicting(in_solution)]
        kl = teacher[_predicting(in_teacher)] - student[_predicting(in_student)]
        alpha = self.settings.alpha
        r_ss, r_kl = solution.mean() + alpha * solution.min(), kl.mean() + alpha * kl.max()
        return float(r_ss - self.settings.lambda_kl * r_kl) + (0.0 if tag else self.settings.missing_end_tag)

    @torch.no_grad()
    def _logprobs(self, model: torch.nn.Module, token_ids: list[int]) -> Tensor:
        """`[T - 1]`: of every token but the first."""
        padded = self.tokenizer.pad({"input_ids": [token_ids]}, return_tensors="pt")
        logits = model(**padded, use_cache=False).logits[:, :-1] / self.settings.temperature
        gathered: Tensor = logits.log_softmax(-1).gather(2, padded["input_ids"][:, 1:, None])
        return gathered[0, :, 0]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _predicting(piece: slice) -> slice:
    """Where the log-probs of a piece's tokens stand."""
    return slice(piece.start - 1, piece.stop - 1)


def _find(ids: list[int], alone: list[int], *, start: int) -> slice:
    """Where a piece stands in `ids`, without tokens at its edges that are others there than `alone`.

    `start`: number of tokens before it, of which the last may be joined with its first. Raises ValueError if it is not
    there, or if it is empty and so has no mean.
    """
    for piece in (alone, alone[1:], alone[:-1], alone[1:-1]):
        for index in range(max(start - 1, 0), len(ids) - len(piece) + 1):
            if piece and ids[index : index + len(piece)] == piece:
                return slice(index, index + len(piece))
    raise ValueError("a piece of the text has no tokens, or other ones within the text than alone")
