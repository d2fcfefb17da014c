"""On tokenizers of real models every format has the tokens of the whole text, by the library `tokenizers`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.prompts.pairs import PairBuilder, pair_builder
from megatron_rlt.prompts.student import StudentFormat
from megatron_rlt.prompts.tags import R1, student_system, teacher_system
from megatron_rlt.prompts.teacher import TeacherFormat
from megatron_rlt.types import Problem
from tests.prompts.real_tokenizers import NAMES, real_tokenizer
from tests.prompts.texts import QUICK, student_text, teacher_text

SENTENCES = (
    "Okay, so I need 3*(x+1) = 12.",
    "Wait!",
    "(a) f(x)=\\frac{1}{2}\\cdot 10^{-3}",
    "**Step 1**: count — twice?",
    "那么答案是 42。",
    "print('é 🙂')\n```",
    "I think\n\tso...",
    "[x]",
)
writing = st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=4).flatmap(
    lambda parts: st.sampled_from((" ", "\n", "\n\n", ".\n\n")).map(lambda between: between.join(parts))
)
around = st.sampled_from((("", ""), ("\n\n", "\n\n"), ("", "\n\n"), ("", "\n")))


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose tokenizer_config.json names the class that reads tokenizer.json as it is."""
    source = real_tokenizer(request.param, request.config.cache)
    target = tmp_path_factory.mktemp(request.param)
    shutil.copytree(source, target, dirs_exist_ok=True)
    if request.param == "deepseek_v3":
        with pytest.raises(ValueError, match=r'LlamaTokenizer.*"tokenizer_class": "PreTrainedTokenizerFast"') as said:
            pair_builder(target, target, PromptConfig())
        assert str(target) in str(said.value)
        settings = target / "tokenizer_config.json"
        named = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(named))
    return target


@pytest.fixture(scope="module")
def own(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def stratos(folder: Path) -> PairBuilder:
    return pair_builder(folder, folder, PromptConfig())


@pytest.fixture(scope="module", params=["stratos", "r1"])
def pairs(request: pytest.FixtureRequest, stratos: PairBuilder) -> PairBuilder:
    """Both tag sets on one tokenizer: Gemma's takes two seconds to load."""
    if request.param == "stratos":
        return stratos
    prompts, tokenizer = PromptConfig(tags="r1"), stratos.teacher.tokenizer
    teacher = TeacherFormat(tokenizer, R1, system=teacher_system(prompts), max_prompt_tokens=1000)
    return PairBuilder(teacher, StudentFormat(tokenizer, R1, system=student_system(prompts)), one_tokenizer=True)


@QUICK
@given(question=writing, solution=writing, trace=writing, ends=around)
def test_what_models_read_and_write_has_the_tokens_of_its_whole_text(
    pairs: PairBuilder, own: Tokenizer, question: str, solution: str, trace: str, ends: tuple[str, str]
) -> None:
    def whole(system: str, text: str) -> list[int]:
        rendered = pairs.teacher.tokenizer.render(system, question)
        return list(own.encode(f"{rendered}{text}", add_special_tokens=False).ids)

    teacher, student, tags = pairs.teacher, pairs.student, pairs.teacher.tags
    problem = Problem("p", question, f"{ends[0]}{solution}{ends[1]}", f"{ends[0]}{trace}{ends[1]}")
    warm_up = teacher.sft_sequence(problem).token_ids.tolist()
    assert warm_up[:-1] == whole(teacher.system, teacher_text(tags, trace, solution))
    distilled = student.sft_sequence(problem, whole_turn=True).token_ids.tolist()
    assert distilled[:-1] == whole(student.system, student_text(tags, trace, solution))

    assert problem.reasoning_trace is not None
    pair = pairs.pair_from_text(problem, problem.reasoning_trace)
    assert pair.teacher.token_ids.tolist() == warm_up, "`score` sees what a warmed-up teacher writes"
    assert pair.student.token_ids.tolist() == distilled, "and a student what it was trained on"
    prefilled = student.solving_prompt("p", question, prefill_thought=True).tolist()
    assert distilled[: len(prefilled)] == prefilled
    sampled = pairs.pair_from_ids(problem, pairs.explanation_ids(problem.reasoning_trace).tolist())
    assert sampled.teacher.token_ids.tolist() == warm_up, "a control takes the very place"


def test_the_students_span_of_a_solution_is_what_the_reference_finds(pairs: PairBuilder, own: Tokenizer) -> None:
    """It encodes the text between the tags alone and drops tokens at its edges that the whole text does not have."""
    if not pairs.student.tags.student_solution_tags:
        pytest.skip("the reference has no format without solution tags")
    pair = pairs.pair_from_text(Problem("p", "2 + 2?", "It is 4."), "Two and two.")
    alone = own.encode("\n\nIt is 4.\n\n", add_special_tokens=False).ids
    whole = pair.student.token_ids.tolist()
    found = next(
        piece
        for piece in (alone, alone[1:], alone[:-1], alone[1:-1])
        if any(whole[i : i + len(piece)] == piece for i in range(len(whole)))
    )
    assert pair.solution_span.of(pair.student.token_ids).tolist() == found


def test_a_student_of_another_family_reads_the_whole_texts_tokens(request: pytest.FixtureRequest) -> None:
    teacher, student = (real_tokenizer(name, request.config.cache) for name in ("qwen3", "llama3_1"))
    pairs = pair_builder(teacher, student, PromptConfig())
    pair = pairs.pair_from_text(Problem("p", "2 + 2?", "It is 4."), "Two and two 🙂.")
    text = student_text(pairs.student.tags, "Two and two 🙂.", "It is 4.")
    rendered = pairs.student.tokenizer.render(pairs.student.system, "2 + 2?")
    whole = Tokenizer.from_file(str(student / "tokenizer.json")).encode(f"{rendered}{text}", add_special_tokens=False)
    assert pair.student.token_ids.tolist()[:-1] == whole.ids
    decode = pairs.student.tokenizer.decode
    assert decode(pair.explanation_span.of(pair.student.token_ids).tolist()) == "Two and two 🙂.\n\n"


def test_turn_markers_make_no_turn_whether_special_or_not(pairs: PairBuilder) -> None:
    """DeepSeek's are ordinary tokens."""
    tokenizer = pairs.teacher.tokenizer
    rendered = tokenizer.render("", "2 + 2?")
    markers = {i: str(token) for i, token in tokenizer.hf.added_tokens_decoder.items() if str(token) in rendered}
    markers = {i: token for i, token in markers.items() if token.strip()}
    assert len(markers) >= 2
    for token_id, marker in markers.items():
        with pytest.raises(ValueError, match="problem p: its question holds the special token"):
            pairs.check_problem(Problem("p", f"2 + 2?{marker}4", "4"))
        pair = pairs.pair_from_text(Problem("p", "2 + 2?", f"It is {marker} 4."), f"Two {marker} and two.")
        for sequence in (pair.teacher, pair.student):
            prompt = tokenizer.chat_prefix("", "2 + 2?")
            assert sequence.token_ids.tolist().count(token_id) == prompt.count(token_id) + _of_system(pairs, token_id)
        assert "contains_tags" in pair.flags


def _of_system(pairs: PairBuilder, token_id: int) -> int:
    """Further occurrences of a marker in a prompt with a system message, and one that may end the turn."""
    tokenizer = pairs.teacher.tokenizer
    with_system, without = (tokenizer.chat_prefix(system, "2 + 2?") for system in ("Teach.", ""))
    return with_system.count(token_id) - without.count(token_id) + (token_id == tokenizer.end_of_turn_id)
