"""Builds `ScoringPair`s: the teacher's and the student's sequence of one explanation, with flags for format faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from megatron_rlt.prompts.tokenizer_checks import check_exact_text, check_same_ids
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem, Prompt, ScoringPair, Span, SpannedSequence
from megatron_rlt.visible_text import is_blank


@dataclass(frozen=True, eq=False)
class PairBuilder:
    """Builds scoring pairs from sampled completions or from existing explanations.

    With one tokenizer the student reads the teacher's ids unchanged. For a student with another tokenizer, the
    explanation is decoded once and re-encoded with all that follows it; a span holds the tokens that lie wholly within
    its text. Such a student reads U+FFFD in place of a character that was cut in half.
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
        """Pair for an explanation given as text, with the tokens and the split of a completion that a teacher writes.

        An explanation that contains an end tag keeps all its tokens and is flagged. White space that the prompt ends
        with belongs to the explanation's span where the text brings it and the tokenizer keeps it apart from the tag.
        """
        completion_ids, num_explanation_tokens = self.teacher.completion(explanation)
        parts = CompletionParts(num_explanation_tokens, has_end_tag=True, text_after_end_tag="")
        built = self._build(self.teacher.prompt(problem), completion_ids, parts, truncated=False)
        pair = replace(built, explanation_text=explanation)
        padding = self.teacher.tags.padding
        brings_padding = num_explanation_tokens > 0 and bool(padding) and explanation.startswith(padding)
        return self._with_opening_padding(pair) if brings_padding else pair

    def pair_from_ids(self, problem: Problem, explanation_ids: Sequence[int]) -> ScoringPair:
        """Pair for an explanation given as token ids, which stay as they are."""
        parts = CompletionParts(len(explanation_ids), has_end_tag=True, text_after_end_tag="")
        ending = self.teacher.ending(self.teacher.tokenizer.decode(explanation_ids))
        return self._build(self.teacher.prompt(problem), [*explanation_ids, *ending], parts, truncated=False)

    def explanation_ids(self, explanation: str) -> Tensor:
        """`[E]` int64: the ids that `pair_from_text` gives an explanation."""
        completion_ids, num_explanation_tokens = self.teacher.completion(explanation)
        return torch.tensor(completion_ids[:num_explanation_tokens], dtype=torch.int64)

    def _with_opening_padding(self, pair: ScoringPair) -> ScoringPair:
        """The same sequences; the explanation's spans begin with the padding that stands before them."""
        tags = self.teacher.tags
        written = _padding_ids(self.teacher.tokenizer, tags.explanation_open, tags.padding)
        read = _padding_ids(self.student.tokenizer, tags.thought_open, tags.padding)
        if not self.one_tokenizer or written != read:
            return pair
        (completion,), (explanation, solution) = pair.teacher.spans, pair.student.spans
        completion = replace(completion, start=completion.start - len(written))
        explanation = replace(explanation, start=explanation.start - len(read))
        return replace(
            pair,
            teacher=replace(pair.teacher, spans=(completion,)),
            student=replace(pair.student, spans=(explanation, solution)),
            num_explanation_tokens=pair.num_explanation_tokens + len(written),
        )

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
            student=self._read_by_student(prompt.problem, explanation_ids, text),
            num_explanation_tokens=parts.num_explanation_tokens,
            flags=frozenset(self._flags(text, parts, truncated=truncated)),
            explanation_text=text,
            one_tokenizer=self.one_tokenizer,
        )

    def _read_by_student(self, problem: Problem, explanation_ids: list[int], text: str) -> SpannedSequence:
        if self.one_tokenizer:
            return self.student.splice(problem, torch.tensor(explanation_ids, dtype=torch.int64))
        return self.student.splice_text(problem, text)

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
    """The teacher's format with the tokenizer in `folder`.

    Raises ValueError if model, tokenizer, chat template and tags do not go together: `load_tokenizer`,
    `check_exact_text`, `check_template` and `check_tags`.
    """
    return _teacher_format(_exact_tokenizer(folder, prompts), prompts)


def student_format(folder: Path, prompts: PromptConfig) -> StudentFormat:
    """The student's format with the tokenizer in `folder`. Raises ValueError as `teacher_format`."""
    return _student_format(_exact_tokenizer(folder, prompts), prompts)


def pair_builder(teacher_folder: Path, student_folder: Path, prompts: PromptConfig) -> PairBuilder:
    """Both formats, each with its own tokenizer and chat template.

    Raises ValueError as `teacher_format`, or if both have one vocabulary and cut texts differently.
    """
    written = _exact_tokenizer(teacher_folder, prompts)
    read = written if student_folder == teacher_folder else _exact_tokenizer(student_folder, prompts)
    one_tokenizer = read is written or written.hf.get_vocab() == read.hf.get_vocab()
    if one_tokenizer and read is not written:
        check_same_ids(written, read)
    return PairBuilder(_teacher_format(written, prompts), _student_format(read, prompts), one_tokenizer)


def _teacher_format(tokenizer: ChatTokenizer, prompts: PromptConfig) -> TeacherFormat:
    system, limit = teacher_system(prompts), prompts.max_prompt_tokens
    return TeacherFormat(tokenizer, tag_set(prompts), system=system, max_prompt_tokens=limit)


def _student_format(tokenizer: ChatTokenizer, prompts: PromptConfig) -> StudentFormat:
    return StudentFormat(tokenizer, tag_set(prompts), system=student_system(prompts))


def _exact_tokenizer(folder: Path, prompts: PromptConfig) -> ChatTokenizer:
    """The tokenizer of a model; raises ValueError also where the model has no row for one of its ids.

    The rules have compared both before, but only for a folder with a `tokenizer.json`.
    """
    tokenizer = load_tokenizer(folder, date=prompts.date)
    if (folder / "config.json").is_file():  # else a tokenizer alone
        fault = vocabulary_fault(Architecture.from_folder(folder).vocab_size, tokenizer.num_ids)
        if fault is not None:
            raise ValueError(f"{folder}: {fault}")
    if prompts.exact_text:
        check_exact_text(tokenizer)
    return tokenizer


def _padding_ids(tokenizer: ChatTokenizer, tag: str, padding: str) -> list[int]:
    """The padding's tokens behind a tag; empty where the tokenizer joins it with the tag."""
    alone = tokenizer.encode(tag)
    ids = tokenizer.encode(f"{tag}{padding}")
    return ids[len(alone) :] if ids[: len(alone)] == alone else []
