"""The formats that a configuration asks for: model folders and the `prompts` section in, ready formats out."""

from __future__ import annotations

from pathlib import Path

from megatron_rlt.config.sections import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.prompts.tags import student_system, tag_set, teacher_system
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.prompts.tokenizer import load_tokenizer, tokenizer_difference


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
