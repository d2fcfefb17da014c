import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, teacher_format
from megatron_rlt.prompts.stopping import StopCondition
from megatron_rlt.types import Problem
from tests.prompts.texts import QUICK, any_text, bare, questions, solutions, teacher_text
from tests.tiny_tokenizers import Style

PROBLEM = Problem("p1", "2+2?", "It is 4.", reasoning_trace="Count up twice from 2.")


def test_prompt_shows_the_solution_and_opens_the_explanation(folders: dict[Style, Path]) -> None:
    teacher = teacher_format(folders["qwen"], PromptConfig(teacher_system="Teach."))
    assert teacher.tokenizer.decode(teacher.prompt(PROBLEM).token_ids.tolist()) == (
        "<|im_start|>system\nTeach.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n"
    )
    teacher = teacher_format(folders["llama"], PromptConfig(tags="r1", teacher_system=""))
    assert teacher.tokenizer.decode(teacher.prompt(PROBLEM).token_ids.tolist()) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<solution>\nIt is 4.\n</solution>\n\n<explanation>\n"
    )


@QUICK
@given(question=questions, solution=solutions, trace=any_text.filter(bool))
def test_sft_sequence_is_the_prompt_and_a_span_from_trace_to_end_of_turn(
    pairs: PairBuilder, question: str, solution: str, trace: str
) -> None:
    teacher = pairs.teacher
    problem = Problem("p", question, solution, reasoning_trace=trace)
    prompt = teacher.prompt(problem).token_ids
    sequence = teacher.sft_sequence(problem)
    (span,) = sequence.spans
    assert torch.equal(sequence.token_ids[: span.start], prompt)
    target = span.of(sequence.token_ids).tolist()
    assert target[-1] == teacher.tokenizer.end_of_turn_id
    written, ending = bare(trace), f"{teacher.tags.padding}{teacher.tags.explanation_close}"
    completion = f"{written}{ending}" if written else teacher.tags.explanation_close
    assert target[:-1] == teacher.tokenizer.encode(completion), "one text, encoded in one call"
    assert span.stop == len(sequence)
    shown = teacher_text(teacher.tags, "", bare(solution)).removesuffix(ending)
    assert teacher.tokenizer.decode(prompt.tolist()).endswith(shown)


def test_rows_that_cannot_be_prompted_are_named(folders: dict[Style, Path]) -> None:
    teacher = teacher_format(folders["qwen"], PromptConfig(teacher_system="", max_prompt_tokens=80))
    num_tokens = len(teacher.prompt(PROBLEM).token_ids)
    short = teacher_format(folders["qwen"], PromptConfig(teacher_system="", max_prompt_tokens=num_tokens - 1))
    assert teacher_format(folders["qwen"], PromptConfig(teacher_system="", max_prompt_tokens=num_tokens)).prompt(
        PROBLEM
    )
    with pytest.raises(ValueError, match=f"problem p1: its teacher prompt has {num_tokens} tokens, more than"):
        short.prompt(PROBLEM)
    with pytest.raises(ValueError, match=r"its question holds the special token '<\|im_end\|>'"):
        teacher.prompt(dataclasses.replace(PROBLEM, question="2+2<|im_end|>?"))
    with pytest.raises(ValueError, match="problem p1: its solution is empty"):
        teacher.prompt(dataclasses.replace(PROBLEM, solution=" \n"))
    with pytest.raises(ValueError, match="problem p1 has no reasoning_trace"):
        teacher.sft_sequence(dataclasses.replace(PROBLEM, reasoning_trace=None))


def first_stop(condition: StopCondition, token_ids: list[int]) -> int | None:
    return next((n for n in range(len(token_ids) + 1) if condition(token_ids[:n])), None)


@QUICK
@given(before=any_text, after=any_text)
def test_sampling_stops_with_the_token_that_completes_the_end_tag(pairs: PairBuilder, before: str, after: str) -> None:
    teacher, tokenizer = pairs.teacher, pairs.teacher.tokenizer
    token_ids = tokenizer.encode(f"{before}{teacher.tags.explanation_close}{after}")
    stop = first_stop(teacher.stop_condition(stop_at_end_tag=True), token_ids)
    assert stop is not None
    assert teacher.tags.explanation_close in tokenizer.decode(token_ids[:stop])
    assert teacher.tags.explanation_close not in tokenizer.decode(token_ids[: stop - 1])
    waiting = teacher.stop_condition(stop_at_end_tag=False)
    assert first_stop(waiting, token_ids) is None
    assert first_stop(waiting, [*token_ids, tokenizer.end_of_turn_id, 5]) == len(token_ids) + 1


@QUICK
@given(data=st.data())
def test_sampling_stops_within_any_ids_as_the_whole_text_would(pairs: PairBuilder, data: st.DataObject) -> None:
    """Random ids decode to broken characters; the bounded tail must still agree with the whole text."""
    teacher, tokenizer = pairs.teacher, pairs.teacher.tokenizer
    ids = st.lists(st.integers(0, 391), max_size=30)
    tag = tokenizer.encode(data.draw(st.sampled_from(["", "."])) + teacher.tags.explanation_close)
    token_ids = data.draw(ids) + tag + data.draw(ids)
    condition = teacher.stop_condition(stop_at_end_tag=True)
    found = [teacher.tags.explanation_close in tokenizer.decode(token_ids[:n]) for n in range(len(token_ids) + 1)]
    assert first_stop(condition, token_ids) == found.index(True)
