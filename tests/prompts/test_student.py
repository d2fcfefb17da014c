from pathlib import Path

import pytest
import torch
from hypothesis import given
from transformers import AutoTokenizer

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, student_format
from megatron_rlt.types import Problem
from tests.prompts.texts import QUICK, any_text, questions, solutions
from tests.tiny_tokenizers import Style


def test_student_text_is_the_papers(folders: dict[Style, Path]) -> None:
    problem = Problem("p1", "2+2?", "It is 4.", reasoning_trace="Count.")
    student = student_format(folders["qwen"], PromptConfig(student_system="Think."))
    explanation = torch.tensor(student.tokenizer.encode("Count."))
    expected = (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "<|begin_of_thought|>Count.<|end_of_thought|>\n\n<|begin_of_solution|>It is 4.<|end_of_solution|><|im_end|>"
    )
    assert student.tokenizer.decode(student.splice(problem, explanation).token_ids.tolist()) == expected
    assert student.tokenizer.decode(student.sft_sequence(problem, whole_turn=False).token_ids.tolist()) == expected
    student = student_format(folders["llama"], PromptConfig(tags="r1", student_system=""))
    explanation = torch.tensor(student.tokenizer.encode("Count."))
    assert student.tokenizer.decode(student.splice(problem, explanation).token_ids.tolist()) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "<think>Count.</think>\n\n<solution>It is 4.</solution><|eot_id|>"
    )


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
    assert tokenizer.decode(second.of(sequence.token_ids).tolist()) == solution
    assert tokenizer.decode(sequence.token_ids[: first.start].tolist()).endswith(tags.thought_open)
    between = sequence.token_ids[first.stop : second.start].tolist()
    assert tokenizer.decode(between) == f"{tags.thought_close}\n\n{tags.solution_open}"
    after = sequence.token_ids[second.stop :].tolist()
    assert after[-1] == tokenizer.end_of_turn_id
    assert tokenizer.decode(after[:-1]) == tags.solution_close


@QUICK
@given(question=questions, solution=solutions, trace=any_text.filter(bool))
def test_sft_span_runs_from_trace_to_end_of_turn(pairs: PairBuilder, question: str, solution: str, trace: str) -> None:
    student, tokenizer, tags = pairs.student, pairs.student.tokenizer, pairs.student.tags
    sequence = student.sft_sequence(Problem("p", question, solution, reasoning_trace=trace), whole_turn=False)
    (span,) = sequence.spans
    target = span.of(sequence.token_ids).tolist()
    assert target[-1] == tokenizer.end_of_turn_id
    assert tokenizer.decode(target[:-1]) == f"{trace}{tags.student_bridge}{solution}{tags.solution_close}"
    assert tokenizer.decode(sequence.token_ids[: span.start].tolist()).endswith(tags.thought_open)


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
    opening = ids("<|begin_of_thought|>")
    rest = [
        *ids("Count."),
        *ids("<|end_of_thought|>\n\n<|begin_of_solution|>"),
        *ids("It is 4."),
        *ids("<|end_of_solution|>"),
        student.tokenizer.end_of_turn_id,
    ]
    assert len(opening) > 0
    assert sequence.token_ids.tolist() == prompt + opening + rest
    (span,) = sequence.spans
    assert span.of(sequence.token_ids).tolist() == (opening + rest if whole_turn else rest)


def test_a_solution_of_one_token_has_a_span_of_one(pairs: PairBuilder) -> None:
    sequence = pairs.student.splice(Problem("p", "1+2?", "3"), torch.tensor([5, 6]))
    assert [len(span) for span in sequence.spans] == [2, 1]
    assert sequence.spans[1].of(sequence.token_ids).tolist() == pairs.student.tokenizer.encode("3")


def test_a_solving_prompt_is_what_the_trained_sequence_begins_with(pairs: PairBuilder) -> None:
    student, tokenizer = pairs.student, pairs.student.tokenizer
    sequence = student.splice(Problem("p", "1+2?", "3"), torch.tensor([5, 6]))
    prefilled = student.solving_prompt("p", "1+2?", prefill_thought=True)
    assert prefilled.tolist() == sequence.token_ids[: sequence.spans[0].start].tolist()
    plain = student.solving_prompt("p", "1+2?", prefill_thought=False)
    assert plain.tolist() == tokenizer.chat_prefix(student.system, "1+2?")
    assert tokenizer.decode(prefilled[len(plain) :].tolist()) == student.tags.thought_open


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
