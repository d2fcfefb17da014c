"""The formats that a configuration asks for: model folders and the `prompts` section in, ready formats out."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.config.sections import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.prompts.tags import student_system, tag_set, teacher_system
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.prompts.tokenizer import check_same_tokenizer, load_tokenizer


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


def pair_builder(teacher_folder: Path, student_folder: Path, prompts: PromptConfig) -> PairBuilder:
    """Both formats, each with its own model's chat template. Raises ValueError unless both share one vocabulary."""
    check_same_tokenizer(teacher_folder, student_folder)
    return PairBuilder(teacher_format(teacher_folder, prompts), student_format(student_folder, prompts))
