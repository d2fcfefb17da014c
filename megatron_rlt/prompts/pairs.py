"""Builds `ScoringPair`s: the teacher's and the student's sequence of one explanation, with flags for format faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.model_files import vocabulary_fault
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.stopping import CompletionParts, split_completion
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.prompts.tags import student_system, tag_set, teacher_system
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.prompts.tokenizer import ChatTokenizer, load_tokenizer
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem, Prompt, ScoringPair, Span, SpannedSequence
from megatron_rlt.visible_text import is_blank


@dataclass(frozen=True, eq=False)
class PairBuilder:
    """Builds scoring pairs from sampled completions or from existing explanations.

    With one tokenizer the student reads the teacher's ids unchanged. For a student with another tokenizer, the
    explanation is decoded once and re-encoded between the student's tags; the spans stay exact because the sequence is
    concatenated from pieces. Such a student reads U+FFFD in place of a character that was cut in half.
    """

    teacher: TeacherFormat
    student: StudentFormat
    one_tokenizer: bool  # teacher and student share the vocabulary

    def check_problem(self, problem: Problem) -> None:
        """Raise ValueError naming the problem if either format cannot use it."""
        self.teacher.prompt(problem)
        self.student.splice(problem, torch.empty(0, dtype=torch.int64))

    def pair(self, prompt: Prompt, completion: Completion) -> ScoringPair:
        """Pair for a sampled completion; a missing end tag is flagged, not an error."""
        sampled: list[int] = completion.token_ids.tolist()
        parts = split_completion(self.teacher.tokenizer, sampled, self.teacher.tags.explanation_close)
        return self._build(prompt, sampled, parts, truncated=completion.finish_reason is FinishReason.LENGTH)

    def pair_from_text(self, problem: Problem, explanation: str) -> ScoringPair:
        """Pair for an explanation given as text: explanation, separator, end tag, end of turn.

        An explanation that contains an end tag keeps all its tokens and is flagged.
        """
        return self.pair_from_ids(problem, self.teacher.tokenizer.encode(explanation))

    def pair_from_ids(self, problem: Problem, explanation_ids: Sequence[int]) -> ScoringPair:
        """Same as `pair_from_text`, for token ids."""
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
        if is_blank(text):
            yield FormatFlag.EMPTY
        # The decoded text shows special tokens too, sampled as one id or spelt out.
        tags = {*self.teacher.tags.texts, *self.student.tags.texts}
        formats = (self.teacher,) if self.one_tokenizer else (self.teacher, self.student)
        if any(tag in text for tag in tags) or any(each.tokenizer.special_token_in(text) for each in formats):
            yield FormatFlag.CONTAINS_TAGS
        if truncated:
            yield FormatFlag.TRUNCATED


def teacher_format(folder: Path, prompts: PromptConfig) -> TeacherFormat:
    """The teacher's format with the tokenizer in `folder`. Raises ValueError as `load_tokenizer` and `check_tags`."""
    tokenizer, system, limit = _model_tokenizer(folder), teacher_system(prompts), prompts.max_prompt_tokens
    return TeacherFormat(tokenizer, tag_set(prompts), system=system, max_prompt_tokens=limit)


def student_format(folder: Path, prompts: PromptConfig) -> StudentFormat:
    """The student's format with the tokenizer in `folder`. Raises ValueError as `load_tokenizer` and `check_tags`."""
    return StudentFormat(_model_tokenizer(folder), tag_set(prompts), system=student_system(prompts))


def pair_builder(teacher_folder: Path, student_folder: Path, prompts: PromptConfig) -> PairBuilder:
    """Both formats, each with its own tokenizer and chat template. Raises ValueError as `teacher_format` does."""
    teacher, student = teacher_format(teacher_folder, prompts), student_format(student_folder, prompts)
    one_tokenizer = teacher.tokenizer.hf.get_vocab() == student.tokenizer.hf.get_vocab()
    return PairBuilder(teacher, student, one_tokenizer)


def _model_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a model; raises ValueError also where the model has no row for one of its ids.

    The rules have compared both before, but only for a folder with a `tokenizer.json`.
    """
    tokenizer = load_tokenizer(folder)
    if not (folder / "config.json").is_file():  # a tokenizer alone
        return tokenizer
    fault = vocabulary_fault(Architecture.from_folder(folder).vocab_size, tokenizer.num_ids)
    if fault is not None:
        raise ValueError(f"{folder}: {fault}")
    return tokenizer
