"""From a completion to the two sequences that are scored, and the flags that say what is wrong with its form.

In: a teacher's prompt and completion, or the text of an explanation that already exists. Out: a `ScoringPair`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlt.config.sections import PromptConfig
from megatron_rlt.prompts.stopping import CompletionParts, split_completion
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.prompts.tags import student_system, tag_set, teacher_system
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.prompts.tokenizer import load_tokenizer, tokenizer_difference
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem, Prompt, ScoringPair, Span, SpannedSequence


@dataclass(frozen=True, eq=False)
class PairBuilder:
    """Builds scoring pairs.

    With one tokenizer the student reads the teacher's ids as they are. A student with another one is the one exception
    to "tokens stay tokens": the explanation's text, decoded once, is encoded by the student's tokenizer between the
    student's tags. The spans are known all the same: the sequence is built piece by piece, nothing is searched for.
    Bytes of a character that was cut in half are no text: such a student reads U+FFFD in their place.
    """

    teacher: TeacherFormat
    student: StudentFormat
    one_tokenizer: bool  # whether an id means the same to both

    def check_problem(self, problem: Problem) -> None:
        """Raise ValueError naming the problem if either format could not use it."""
        self.teacher.prompt(problem)
        self.student.splice(problem, torch.empty(0, dtype=torch.int64))

    def pair(self, prompt: Prompt, completion: Completion) -> ScoringPair:
        """One sampled completion as teacher and student see it; a missing end tag is flagged, not an error."""
        sampled: list[int] = completion.token_ids.tolist()
        parts = split_completion(self.teacher.tokenizer, sampled, self.teacher.tags.explanation_close)
        return self._build(prompt, sampled, parts, truncated=completion.finish_reason is FinishReason.LENGTH)

    def pair_from_text(self, problem: Problem, explanation: str) -> ScoringPair:
        """The pair of an explanation given as text, which is encoded as it stands.

        The completion is the explanation, the separator, the end tag and the end of turn, as a teacher would end
        it. An explanation that holds an end tag keeps all its tokens and is flagged.
        """
        return self.pair_from_ids(problem, self.teacher.tokenizer.encode(explanation))

    def pair_from_ids(self, problem: Problem, explanation_ids: Sequence[int]) -> ScoringPair:
        """As `pair_from_text`, of an explanation given as ids, which are taken over as they are."""
        parts = CompletionParts(len(explanation_ids), has_end_tag=True, text_after_end_tag="")
        prompt = self.teacher.prompt(problem)
        return self._build(prompt, [*explanation_ids, *self.teacher.ending()], parts, truncated=False)

    def _build(
        self, prompt: Prompt, completion_ids: list[int], parts: CompletionParts, *, truncated: bool
    ) -> ScoringPair:
        completion = torch.tensor(completion_ids, dtype=torch.int64)
        explanation_ids = completion_ids[: parts.num_explanation_tokens]
        text = self.teacher.tokenizer.decode(explanation_ids)
        teacher_ids = torch.cat([prompt.token_ids, completion])
        return ScoringPair(
            problem=prompt.problem,
            teacher=SpannedSequence(teacher_ids, (Span(len(prompt.token_ids), len(teacher_ids)),)),
            student=self.student.splice(prompt.problem, self._read_by_student(explanation_ids, text)),
            num_explanation_tokens=parts.num_explanation_tokens,
            flags=frozenset(self._flags(text, parts, truncated=truncated)),
            explanation_text=text,
            one_tokenizer=self.one_tokenizer,
        )

    def _read_by_student(self, explanation_ids: list[int], text: str) -> Tensor:
        ids = explanation_ids if self.one_tokenizer else self.student.tokenizer.encode(text)
        return torch.tensor(ids, dtype=torch.int64)

    def _flags(self, text: str, parts: CompletionParts, *, truncated: bool) -> Iterator[FormatFlag]:
        if not parts.has_end_tag:
            yield FormatFlag.MISSING_END_TAG
        if parts.text_after_end_tag.strip():
            yield FormatFlag.TEXT_AFTER_END_TAG
        if not text.strip():
            yield FormatFlag.EMPTY
        # The text shows special tokens too, sampled as one id or spelt out.
        tags = {*self.teacher.tags.texts, *self.student.tags.texts}
        tokenizers = (
            {self.teacher.tokenizer} if self.one_tokenizer else {self.teacher.tokenizer, self.student.tokenizer}
        )
        if any(tag in text for tag in tags) or any(each.special_token_in(text) is not None for each in tokenizers):
            yield FormatFlag.CONTAINS_TAGS
        if truncated:
            yield FormatFlag.TRUNCATED


# The formats that a configuration asks for: model folders and the `prompts` section in, ready formats out.
def teacher_format(folder: Path, prompts: PromptConfig) -> TeacherFormat:
    """The teacher's format with the tokenizer in `folder`. Raises ValueError as `load_tokenizer` and `check_tags`."""
    return TeacherFormat(
        load_tokenizer(folder),
        tag_set(prompts),
        system=teacher_system(prompts),
        max_prompt_tokens=prompts.max_prompt_tokens,
    )


def student_format(folder: Path, prompts: PromptConfig) -> StudentFormat:
    """The student's format with the tokenizer in `folder`. Raises ValueError as `load_tokenizer` and `check_tags`."""
    return StudentFormat(load_tokenizer(folder), tag_set(prompts), system=student_system(prompts))


def pair_builder(
    teacher_folder: Path, student_folder: Path, prompts: PromptConfig, *, needs_one_tokenizer: bool = True
) -> PairBuilder:
    """Both formats, each with its own model's tokenizer and chat template.

    Args:
        needs_one_tokenizer: whether something compares the two models token by token, as r_KL does.

    Raises:
        ValueError: as `load_tokenizer` and `check_tags`; or one tokenizer is needed and there are two.
    """
    teacher, student = teacher_format(teacher_folder, prompts), student_format(student_folder, prompts)
    difference = tokenizer_difference(teacher.tokenizer, student.tokenizer)
    if difference is not None and needs_one_tokenizer:
        raise ValueError(
            f"student.model: {difference}, and r_KL compares token by token and needs one tokenizer; set"
            " reward.lambda_kl=0 to reward r_SS alone, or take a student with the teacher's tokenizer"
        )
    return PairBuilder(teacher, student, one_tokenizer=difference is None)
