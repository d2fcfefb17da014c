"""A student with a tokenizer of its own reads the explanation's text; the teacher's ids stay what was sampled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem
from tests.prompts.texts import QUICK, any_text, is_end_of_section
from tests.tiny_tokenizers import OTHER_SENTENCES, tiny_tokenizer

PROBLEM = Problem("p", "2+2?", "the answer is 4")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> PairBuilder:
    teacher = tiny_tokenizer(tmp_path_factory.mktemp("teacher"), "qwen")
    student = tiny_tokenizer(tmp_path_factory.mktemp("student"), "llama", OTHER_SENTENCES)
    return pair_builder(teacher, student, PromptConfig())


@QUICK
@given(text=any_text, data=st.data())
def test_the_student_reads_its_own_tokens_of_the_explanations_text(
    mixed: PairBuilder, text: str, data: st.DataObject
) -> None:
    teacher, student = mixed.teacher.tokenizer, mixed.student.tokenizer
    noise = data.draw(st.lists(st.integers(0, len(teacher.hf) - 1), max_size=12))
    sampled = (
        teacher.encode(text) + noise + teacher.encode(data.draw(st.sampled_from(["", mixed.teacher.tags.teacher_end])))
    )
    ids = torch.tensor(sampled, dtype=torch.int64)
    completion = Completion(ids, torch.zeros(len(sampled)), 0.7, FinishReason.STOP, seed=0, policy_version=0)
    pair = mixed.pair(mixed.teacher.prompt(PROBLEM), completion)

    assert not pair.one_tokenizer
    assert pair.completion_ids.tolist() == sampled
    assert pair.explanation_text == teacher.decode(sampled[: pair.num_explanation_tokens])
    read = pair.student.token_ids.tolist()
    opening = "<|begin_of_thought|>\n\n"
    closing = "<|end_of_thought|>\n\n<|begin_of_solution|>\n\nthe answer is 4\n\n<|end_of_solution|>"
    whole = student.encode(f"{pair.explanation_text}{closing}")
    assert read[-len(whole) - 1 :] == [*whole, student.end_of_turn_id], "the tokens of the whole text"
    assert student.decode(read[: -len(whole) - 1]).endswith(opening)
    # The longest start of the whole text's tokens that does not reach into the tag.
    lengths = [len(student.decode(whole[:count])) for count in range(len(whole) + 1)]
    kept = max(count for count, length in enumerate(lengths) if length <= len(pair.explanation_text))
    assert pair.explanation_span.of(pair.student.token_ids).tolist() == whole[:kept]
    scored = pair.solution_span.of(pair.student.token_ids).tolist()
    assert is_end_of_section(student.decode(scored), "\n\nthe answer is 4\n\n")


def test_both_tokenizers_write_the_same_text_in_other_lengths(mixed: PairBuilder) -> None:
    """Else this file would test nothing."""
    pair = mixed.pair_from_text(PROBLEM, "First we add the numbers, so the answer is seven.")
    assert pair.num_explanation_tokens < len(pair.explanation_span)
    assert pair.well_formed


@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>"])
def test_special_tokens_of_either_tokenizer_are_flagged_and_spelt_out(mixed: PairBuilder, token: str) -> None:
    pair = mixed.pair_from_text(PROBLEM, f"One {token} two")
    assert pair.flags == {FormatFlag.CONTAINS_TAGS}
    read = pair.explanation_span.of(pair.student.token_ids).tolist()
    assert not set(read) & mixed.student.tokenizer.special_tokens.keys()


def test_one_folder_is_one_tokenizer(mixed: PairBuilder) -> None:
    folder = mixed.teacher.tokenizer.folder
    assert pair_builder(folder, folder, PromptConfig()).one_tokenizer
