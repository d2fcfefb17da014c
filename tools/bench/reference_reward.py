"""The RLT reward as the public reference computes it, for TRL: text in, one sequence at a time, all logits at once.

The completion arrives as decoded text and is encoded again; spans are found by searching for their tokens; teacher and
student each give a whole `[tokens, vocabulary]` log-softmax. What is not copied: its half-precision sums, the first
token of a span that it loses, its garbage collection after every sample. Runs in the project's environment and in
TRL's: torch alone, with a tokenizer and models of transformers as arguments.
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

    teacher_prompt: str
    end_tag: str  # after the explanation, in the teacher's text
    student_prefix: str
    bridge: str  # between explanation and solution, in the student's text
    solution: str
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
        explanation, tag, _ = completion.partition(texts.end_tag.strip())
        explained = self._encode(explanation)
        teacher_ids = self._encode(texts.teacher_prompt + explanation + texts.end_tag)
        student_ids = self._encode(texts.student_prefix + explanation + texts.bridge + texts.solution + texts.ending)
        # The prompt may hold the same words, so each search begins where the piece can begin.
        in_teacher = _find(teacher_ids, explained, start=len(self._encode(texts.teacher_prompt)))
        in_student = _find(student_ids, explained, start=len(self._encode(texts.student_prefix)))
        solution_ids = self._encode(texts.solution)
        after = in_student + len(explained) + len(self._encode(texts.bridge))
        in_solution = _find(student_ids, solution_ids, start=after)
        teacher = self._logprobs(self.teacher, teacher_ids)[in_teacher - 1 :][: len(explained)]
        student = self._logprobs(self.student, student_ids)
        solution = student[in_solution - 1 :][: len(solution_ids)]
        kl = teacher - student[in_student - 1 :][: len(explained)]
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


def _find(ids: list[int], piece: list[int], *, start: int) -> int:
    """Where `piece` begins in `ids`. Raises ValueError if it does not, or if it is empty and so has no mean."""
    found = (index for index in range(start, len(ids) - len(piece) + 1) if ids[index : index + len(piece)] == piece)
    index = next(found, None)
    if index is None or not piece:
        raise ValueError("a piece of the text has no tokens, or other ones within the text than alone")
    return index
