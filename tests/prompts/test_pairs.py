from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.prompts.stopping import BLOCK_TOKENS
from megatron_rlt.prompts.tags import R1, STRATOS
from megatron_rlt.types import Completion, FinishReason, FormatFlag, Problem, ScoringPair
from megatron_rlt.visible_text import is_blank
from tests.prompts.texts import (
    QUICK,
    any_text,
    bare,
    is_end_of_section,
    questions,
    solution_section,
    solutions,
    student_text,
    teacher_text,
)
from tests.tiny_tokenizers import Style

PROBLEM = Problem("p1", "2+2?", "4")


def completion(token_ids: list[int], finish: FinishReason = FinishReason.STOP) -> Completion:
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return Completion(ids, torch.zeros(len(token_ids)), 0.7, finish, seed=0, policy_version=0)


def pair_of(pairs: PairBuilder, token_ids: list[int], finish: FinishReason = FinishReason.STOP) -> ScoringPair:
    return pairs.pair(pairs.teacher.prompt(PROBLEM), completion(token_ids, finish))


def flags_of(pairs: PairBuilder, text: str, *, end_of_turn: bool = True) -> set[str]:
    tokenizer = pairs.teacher.tokenizer
    return set(pair_of(pairs, tokenizer.encode(text) + [tokenizer.end_of_turn_id] * end_of_turn).flags)


@QUICK
@given(question=questions, solution=solutions, text=any_text, data=st.data())
def test_any_sampled_ids_reach_both_sequences_untouched(
    pairs: PairBuilder, question: str, solution: str, text: str, data: st.DataObject
) -> None:
    """Any ids at all, tag or no tag, cut anywhere: nothing is encoded again, and the spans say what they should."""
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    noise = data.draw(st.lists(st.integers(0, len(tokenizer.hf) - 1), max_size=12))
    ending = data.draw(st.sampled_from(["", tags.explanation_close, f"{tags.teacher_end}", f".{tags.teacher_end}."]))
    sampled = tokenizer.encode(text) + noise + tokenizer.encode(ending)
    cut = data.draw(st.integers(0, len(sampled)))
    finish = data.draw(st.sampled_from(FinishReason))
    prompt = pairs.teacher.prompt(Problem("p", question, solution))
    pair = pairs.pair(prompt, completion(sampled[:cut], finish))

    assert pair.completion_ids.tolist() == sampled[:cut]
    assert pair.teacher.token_ids.tolist() == prompt.token_ids.tolist() + sampled[:cut]
    kept = pair.num_explanation_tokens
    assert pair.explanation_ids.tolist() == sampled[:kept]
    assert pair.explanation_span.of(pair.student.token_ids).tolist() == sampled[:kept]
    scored = tokenizer.decode(pair.solution_span.of(pair.student.token_ids).tolist())
    assert is_end_of_section(scored, solution_section(tags, solution))
    assert pair.explanation_text == tokenizer.decode(sampled[:kept])
    assert tags.explanation_close not in pair.explanation_text
    # Longest prefix before the tag: one more token would reach into the tag, or there is no tag to reach.
    if FormatFlag.MISSING_END_TAG in pair.flags:
        assert kept >= cut - 1
    else:
        start = tokenizer.decode(sampled[:cut]).find(tags.explanation_close)
        assert len(tokenizer.decode(sampled[:kept])) <= start < len(tokenizer.decode(sampled[: kept + 1]))
    assert (FormatFlag.TRUNCATED in pair.flags) == (finish is FinishReason.LENGTH)


@QUICK
@given(data=st.data())
def test_the_end_tag_is_found_wherever_it_lies_in_a_long_completion(pairs: PairBuilder, data: st.DataObject) -> None:
    """Random ids, so that characters break at every border; the oracle decodes every prefix whole."""
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    rng = data.draw(st.randoms(use_true_random=False))
    noise = [rng.randrange(392) for _ in range(data.draw(st.integers(BLOCK_TOKENS - 25, BLOCK_TOKENS + 5)))]
    sampled = noise + tokenizer.encode("." + tags.explanation_close) + noise[:20]
    start = tokenizer.decode(sampled).find(tags.explanation_close)
    lengths = [len(tokenizer.decode(sampled[:n])) for n in range(len(sampled) + 1)]
    pair = pair_of(pairs, sampled)
    assert pair.num_explanation_tokens == max(n for n, length in enumerate(lengths) if length <= start)
    assert (FormatFlag.TEXT_AFTER_END_TAG in pair.flags) == bool(tokenizer.decode(noise[:20]).strip())


def test_a_well_formed_completion_keeps_its_whitespace_and_has_no_flag(pairs: PairBuilder) -> None:
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    sampled = tokenizer.encode(f"Count up.\n\n{tags.explanation_close}")
    pair = pair_of(pairs, sampled)
    assert pair.well_formed
    assert pair.explanation_text == "Count up.\n\n"
    written = "Count up.\n" if tags == R1 else "Count up."  # R1's own end of a thought is one newline
    assert student_text(tags, written, "4") in tokenizer.decode(pair.student.token_ids.tolist())


def test_a_token_that_straddles_the_end_tag_belongs_to_the_tag(folders: dict[Style, Path]) -> None:
    pairs = pair_builder(folders["qwen"], folders["qwen"], PromptConfig())
    tokenizer = pairs.teacher.tokenizer
    sampled = tokenizer.encode("Count up.<|end_of_explanation|>")
    straddling = tokenizer.hf.convert_tokens_to_ids(".<|")
    assert straddling in sampled
    pair = pair_of(pairs, sampled)
    assert pair.num_explanation_tokens == sampled.index(straddling)
    assert pair.explanation_text == "Count up"
    assert pair.well_formed


def test_flags_name_what_is_wrong(pairs: PairBuilder) -> None:
    close = pairs.teacher.tags.explanation_close
    assert flags_of(pairs, f"Count.{close}") == set()
    assert flags_of(pairs, f"Count. {close}\n\n") == set()
    assert flags_of(pairs, "Count.") == {"missing_end_tag"}
    assert flags_of(pairs, f"Count.{close} So 4.") == {"text_after_end_tag"}
    assert flags_of(pairs, f"Count.{close}{close}") == {"text_after_end_tag"}
    assert flags_of(pairs, close) == {"empty"}
    assert flags_of(pairs, f" \n\n{close}") == {"empty"}
    assert flags_of(pairs, "") == {"empty", "missing_end_tag"}
    assert flags_of(pairs, "", end_of_turn=False) == {"empty", "missing_end_tag"}


def test_tags_and_end_of_turn_inside_an_explanation_are_flagged(pairs: PairBuilder) -> None:
    tags, tokenizer = pairs.teacher.tags, pairs.teacher.tokenizer
    end_of_turn = tokenizer.decode([tokenizer.end_of_turn_id])
    forbidden = [tag for tag in tags.texts if tag != tags.explanation_close]
    for text in (*forbidden, end_of_turn):
        assert flags_of(pairs, f"Count {text} up.{tags.explanation_close}") == {"contains_tags"}
    ids = tokenizer.encode("Count")
    closing = tokenizer.encode(tags.explanation_close)
    for special in tokenizer.special_tokens:
        assert set(pair_of(pairs, [*ids, special, *ids, *closing]).flags) == {"contains_tags"}
    other = R1 if tags == STRATOS else STRATOS
    assert flags_of(pairs, f"Count {other.thought_open} up.{tags.explanation_close}") == set()


def test_a_completion_cut_by_length_is_truncated_and_still_has_a_closed_student_text(pairs: PairBuilder) -> None:
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    sampled = tokenizer.encode("Count up and")
    pair = pair_of(pairs, sampled, FinishReason.LENGTH)
    assert pair.flags == {FormatFlag.TRUNCATED, FormatFlag.MISSING_END_TAG}
    assert pair.explanation_ids.tolist() == sampled
    read = tokenizer.decode(pair.student.token_ids.tolist())
    assert f"{tags.thought_open}{tags.padding}Count up and{tags.thought_close}" in read


def test_an_empty_explanation_has_an_empty_span_and_the_solution_is_still_scored(pairs: PairBuilder) -> None:
    pair = pair_of(pairs, pairs.teacher.tokenizer.encode(pairs.teacher.tags.explanation_close))
    assert len(pair.explanation_span) == 0
    scored = pairs.teacher.tokenizer.decode(pair.solution_span.of(pair.student.token_ids).tolist())
    assert scored.strip() == "4"
    empty = pair_of(pairs, [])
    assert len(empty.teacher.spans[0]) == 0
    assert empty.explanation_span.start > 0


@QUICK
@given(solution=solutions, explanation=any_text)
def test_given_text_becomes_the_completion_a_teacher_would_have_sampled(
    pairs: PairBuilder, solution: str, explanation: str
) -> None:
    """The very tokens of a warm-up row, whose text is the paper's; the spans hold the explanation's own tokens."""
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    problem = Problem("p", "2+2?", solution, reasoning_trace=explanation)
    pair = pairs.pair_from_text(problem, explanation)
    given_ids = pair.teacher.token_ids.tolist()
    if explanation:
        assert given_ids == pairs.teacher.sft_sequence(problem).token_ids.tolist()
    written = bare(explanation)
    if written:
        assert teacher_text(tags, written, bare(solution)) in tokenizer.decode(given_ids)
        assert student_text(tags, written, bare(solution)) in tokenizer.decode(pair.student.token_ids.tolist())
        spelt = tokenizer.decode(pair.explanation_ids.tolist()).removeprefix(tags.padding)
        assert spelt == f"{written}{tags.padding}".removeprefix(tags.padding)
    assert pair.explanation_text == explanation
    assert pair.explanation_ids.tolist() == pair.explanation_span.of(pair.student.token_ids).tolist()
    assert (FormatFlag.EMPTY in pair.flags) == is_blank(explanation)
    assert (FormatFlag.CONTAINS_TAGS in pair.flags) == (
        any(tag in explanation for tag in tags.texts) or tokenizer.special_token_in(explanation) is not None
    )
    assert not pair.flags - {FormatFlag.EMPTY, FormatFlag.CONTAINS_TAGS}


def test_a_sampled_explanation_is_the_same_text_given(pairs: PairBuilder) -> None:
    """Also where the text brings the newlines at its end, as the rows of `collect` do."""
    given_text = pairs.pair_from_text(PROBLEM, "Count up.")
    sampled = pair_of(pairs, given_text.completion_ids.tolist())
    again = pairs.pair_from_text(PROBLEM, sampled.explanation_text)
    for pair in (sampled, again):
        assert pair.explanation_ids.tolist() == given_text.explanation_ids.tolist()
        assert pair.student.token_ids.tolist() == given_text.student.token_ids.tolist()
        assert pair.student.spans == given_text.student.spans


def test_newlines_that_a_text_brings_are_in_its_span_where_the_tokenizer_keeps_them_apart(
    folders: dict[Style, Path], apart: Path
) -> None:
    """The models read the same bytes either way; where newlines are joined with the tag, there is nothing to score."""
    for folder, own in ((folders["qwen"], ""), (apart, "\n\n")):
        pairs = pair_builder(folder, folder, PromptConfig())
        plain, brought = (pairs.pair_from_text(PROBLEM, text) for text in ("Count up.", "\n\nCount up.\n\n"))
        assert brought.teacher.token_ids.tolist() == plain.teacher.token_ids.tolist()
        assert brought.student.token_ids.tolist() == plain.student.token_ids.tolist()
        decode = pairs.teacher.tokenizer.decode
        assert decode(plain.explanation_ids.tolist()) == "Count up.\n\n"
        assert decode(brought.explanation_ids.tolist()) == f"{own}Count up.\n\n"
        assert decode(brought.explanation_span.of(brought.student.token_ids).tolist()) == f"{own}Count up.\n\n"


def test_given_ids_stay_and_are_closed_with_the_newlines_that_they_lack(pairs: PairBuilder) -> None:
    tokenizer, tags = pairs.teacher.tokenizer, pairs.teacher.tags
    for text, end in (("Count", tags.teacher_end), (f"Count.{tags.padding}", tags.explanation_close)):
        ids = tokenizer.encode(text)
        pair = pairs.pair_from_ids(PROBLEM, ids)
        assert pair.explanation_ids.tolist() == ids
        assert tokenizer.decode(pair.completion_ids.tolist()[:-1]) == f"{text}{end}"
    assert tokenizer.decode(pairs.pair_from_ids(PROBLEM, []).completion_ids.tolist()[:-1]) == tags.explanation_close


def test_a_problem_is_checked_against_both_formats_before_it_is_used(pairs: PairBuilder) -> None:
    pairs.check_problem(PROBLEM)
    special = next(iter(pairs.teacher.tokenizer.special_tokens.values()))
    with pytest.raises(ValueError, match="problem p2: its question holds the special token"):
        pairs.check_problem(Problem("p2", f"2+2{special}", "4"))
    with pytest.raises(ValueError, match="problem p3: its solution is empty"):
        pairs.check_problem(Problem("p3", "2+2?", ""))
