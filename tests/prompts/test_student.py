from pathlib import Path

import pytest
import torch
from hypothesis import given
from transformers import AutoTokenizer

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, student_format
from megatron_rlt.prompts.tags import R1
from megatron_rlt.types import Problem
from tests.prompts.texts import (
    QUICK,
    any_text,
    bare,
    is_end_of_section,
    questions,
    solution_section,
    solutions,
    student_text,
)
from tests.tiny_tokenizers import Style


def test_student_text_is_the_papers(folders: dict[Style, Path]) -> None:
    problem = Problem("p1", "2+2?", "It is 4.", reasoning_trace="Count.")
    student = student_format(folders["qwen"], PromptConfig(student_system="Think."))
    explanation = torch.tensor(student.tokenizer.encode("Count.\n\n"))
    expected = (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "<|begin_of_thought|>\n\nCount.\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|><|im_end|>"
    )
    assert student.tokenizer.decode(student.splice(problem, explanation).token_ids.tolist()) == expected
    assert student.tokenizer.decode(student.sft_sequence(problem, whole_turn=False).token_ids.tolist()) == expected
    student = student_format(folders["llama"], PromptConfig(tags="r1", student_system=""))
    explanation = torch.tensor(student.tokenizer.encode("Count.\n"))
    assert student.tokenizer.decode(student.splice(problem, explanation).token_ids.tolist()) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "<think>\nCount.\n</think>\n\nIt is 4.<|eot_id|>"
    )


@QUICK
@given(question=questions, solution=solutions, trace=any_text.filter(bool))
def test_a_training_text_is_the_papers_whatever_newlines_its_row_brings(
    pairs: PairBuilder, question: str, solution: str, trace: str
) -> None:
    """And its tokens behind the opening are those of the whole text."""
    student, tokenizer, tags = pairs.student, pairs.student.tokenizer, pairs.student.tags
    sequence = student.sft_sequence(Problem("p", question, solution, reasoning_trace=trace), whole_turn=True)
    (turn,) = sequence.spans
    ids = turn.of(sequence.token_ids).tolist()
    text = student_text(tags, bare(trace), bare(solution))
    assert tokenizer.decode(ids[:-1]) == text
    opening = f"{tags.thought_open}{tags.padding}"
    assert ids == tokenizer.encode(opening) + tokenizer.encode(text.removeprefix(opening)) + [tokenizer.end_of_turn_id]
    padded = Problem("p", question, f"\n\n{bare(solution)}\n\n", reasoning_trace=f"\n\n{bare(trace)}\n\n")
    assert student.sft_sequence(padded, whole_turn=True).token_ids.tolist() == sequence.token_ids.tolist()


@QUICK
@given(question=questions, solution=solutions, explanation=any_text)
def test_spans_decode_to_explanation_and_solution(
    pairs: PairBuilder, question: str, solution: str, explanation: str
) -> None:
    student, tokenizer, tags = pairs.student, pairs.student.tokenizer, pairs.student.tags
    explanation_ids = tokenizer.encode(explanation)
    sequence = student.splice(Problem("p", question, solution), torch.tensor(explanation_ids, dtype=torch.int64))
    first, second = sequence.spans
    assert first.of(sequence.token_ids).tolist() == explanation_ids
    scored = tokenizer.decode(second.of(sequence.token_ids).tolist())
    assert is_end_of_section(scored, solution_section(tags, solution))
    assert tokenizer.decode(sequence.token_ids[: first.start].tolist()).endswith(f"{tags.thought_open}{tags.padding}")
    ids = sequence.token_ids[first.stop :].tolist()
    assert ids[-1] == tokenizer.end_of_turn_id
    text = student_text(tags, "", bare(solution)).removeprefix(f"{tags.thought_open}{tags.padding}{tags.padding}")
    assert ids[:-1] == tokenizer.encode(text), "one text, encoded in one call"


@QUICK
@given(question=questions, solution=solutions, trace=any_text.filter(bool))
def test_sft_span_runs_from_trace_to_end_of_turn(pairs: PairBuilder, question: str, solution: str, trace: str) -> None:
    student, tokenizer, tags = pairs.student, pairs.student.tokenizer, pairs.student.tags
    sequence = student.sft_sequence(Problem("p", question, solution, reasoning_trace=trace), whole_turn=False)
    (span,) = sequence.spans
    target = span.of(sequence.token_ids).tolist()
    assert target[-1] == tokenizer.end_of_turn_id
    opening = f"{tags.thought_open}{tags.padding}"
    assert tokenizer.decode(target[:-1]) == student_text(tags, bare(trace), bare(solution)).removeprefix(opening)
    assert tokenizer.decode(sequence.token_ids[: span.start].tolist()).endswith(opening)


@pytest.mark.parametrize("whole_turn", [False, True])
def test_the_wanted_tokens_of_a_training_sequence_piece_by_piece(
    folders: dict[Style, Path], *, whole_turn: bool
) -> None:
    student = student_format(folders["qwen"], PromptConfig(student_system="Think."))
    problem = Problem("p", "2+2?", "It is 4.", reasoning_trace="Count.")
    sequence = student.sft_sequence(problem, whole_turn=whole_turn)
    ids = student.tokenizer.encode
    text = "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    prompt = AutoTokenizer.from_pretrained(folders["qwen"])(text, add_special_tokens=False)["input_ids"]
    opening = ids("<|begin_of_thought|>\n\n")
    text = "Count.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|>"
    rest = [*ids(text), student.tokenizer.end_of_turn_id]
    assert len(opening) > 0
    assert sequence.token_ids.tolist() == prompt + opening + rest
    (span,) = sequence.spans
    assert span.of(sequence.token_ids).tolist() == (opening + rest if whole_turn else rest)


def test_the_smallest_solution_is_scored_with_the_newlines_in_its_tags(pairs: PairBuilder) -> None:
    sequence = pairs.student.splice(Problem("p", "1+2?", "3"), torch.tensor([5, 6]))
    text = "3" if pairs.student.tags == R1 else "3\n\n"
    assert sequence.spans[1].of(sequence.token_ids).tolist() == pairs.student.tokenizer.encode(text)
    assert len(sequence.spans[0]) == 2


def test_a_solutions_span_holds_the_newlines_before_it_where_the_tokenizer_keeps_them_apart(apart: Path) -> None:
    student = student_format(apart, PromptConfig())
    sequence = student.splice(Problem("p", "1+2?", "3"), torch.tensor([5, 6]))
    assert sequence.spans[1].of(sequence.token_ids).tolist() == student.tokenizer.encode("\n\n3\n\n")


def test_a_solving_prompt_is_what_the_trained_sequence_begins_with(pairs: PairBuilder) -> None:
    student, tokenizer = pairs.student, pairs.student.tokenizer
    sequence = student.splice(Problem("p", "1+2?", "3"), torch.tensor([5, 6]))
    prefilled = student.solving_prompt("p", "1+2?", prefill_thought=True)
    assert prefilled.tolist() == sequence.token_ids[: sequence.spans[0].start].tolist()
    plain = student.solving_prompt("p", "1+2?", prefill_thought=False)
    assert plain.tolist() == tokenizer.chat_prefix(student.system, "1+2?")
    opening = "<think>\n" if student.tags == R1 else "<|begin_of_thought|>\n\n"
    assert prefilled[len(plain) :].tolist() == tokenizer.encode(opening)


def test_a_question_that_would_act_as_template_text_is_refused_by_its_id(pairs: PairBuilder) -> None:
    special = next(iter(pairs.student.tokenizer.special_tokens.values()))
    with pytest.raises(ValueError, match=r"problem q7: its question holds the special token"):
        pairs.student.solving_prompt("q7", f"What is {special}?", prefill_thought=True)


def test_a_students_completion_ends_with_its_turn_and_its_text_without_it(pairs: PairBuilder) -> None:
    student, tokenizer, tags = pairs.student, pairs.student.tokenizer, pairs.student.tags
    text = f"We add.{tags.thought_close}\n\n{tags.solution_open}3{tags.solution_close}"
    ids, stop = tokenizer.encode(text), student.solving_stop()
    assert not any(stop(ids[:count]) for count in range(len(ids) + 1)), "tags end nothing"
    assert stop([*ids, tokenizer.end_of_turn_id])
    assert student.completion_text([*ids, tokenizer.end_of_turn_id]) == student.completion_text(ids) == text
    assert student.completion_text([]) == student.completion_text([tokenizer.end_of_turn_id]) == ""
