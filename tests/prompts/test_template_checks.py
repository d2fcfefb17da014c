"""A chat template that loses, moves or adds text is refused at start, by folder and with what to do."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from megatron_rlt.config.prompts import TEMPLATE_DATE, PromptConfig
from megatron_rlt.prompts.pairs import student_format, teacher_format
from megatron_rlt.prompts.tokenizer import load_tokenizer
from megatron_rlt.types import Problem
from tests.tiny_tokenizers import tiny_tokenizer

TURNS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = PromptConfig(teacher_system="Teach.", student_system="Think.")
PLAIN = PromptConfig(teacher_system="", student_system="")


def with_template(folder: Path, template: str) -> Path:
    (tiny_tokenizer(folder) / "chat_template.jinja").write_text(template)
    return folder


def refusal(folder: Path, template: str, prompts: PromptConfig = MARKED) -> str:
    with_template(folder, template)
    said = []
    for make in (teacher_format, student_format):
        with pytest.raises(ValueError, match="chat template of") as error:
            make(folder, prompts)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
        assert "chat_template.jinja" in str(error.value)
        said.append(str(error.value))
    return "; ".join(said)


@pytest.mark.parametrize(
    "content",
    [
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}",  # wants a list of parts
        "",
        "{{ m['content'] | upper }}",
        "{{ m['content'] | e }}",
        "{{ m['content'] | replace('\n', ' ') }}",
        "{{ m['content'] | truncate(20) }}",
        "{{ m['content'].split('<')[-1] }}",
        "{{ m['content'] | wordwrap(10) }}",
    ],
)
def test_a_template_that_loses_or_changes_the_question_is_refused(tmp_path: Path, content: str) -> None:
    turns = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + content + "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    assert "does not write the question as it is" in refusal(tmp_path, turns + HEADER, PLAIN)


def test_a_template_that_drops_or_moves_the_system_prompt_is_refused(tmp_path: Path) -> None:
    dropped = TURNS.replace("in messages", "in messages if m['role'] != 'system'")
    said = refusal(tmp_path / "dropped", dropped + HEADER)
    assert 'does not write the system prompt; set prompts.teacher_system to ""' in said
    assert 'set prompts.student_system to ""' in said
    assert teacher_format(tmp_path / "dropped", PLAIN)
    moved = refusal(tmp_path / "moved", TURNS.replace("in messages", "in messages | reverse") + HEADER)
    assert "does not write the question after the system prompt" in moved


@pytest.mark.parametrize("header", ["", "{% if add_generation_prompt %}{{ '<|im_start|>user\n' }}{% endif %}"])
def test_a_template_that_opens_no_turn_or_another_one_is_refused(tmp_path: Path, header: str) -> None:
    assert "does not open the assistant's turn as it writes one" in refusal(tmp_path, TURNS + header)


@pytest.mark.parametrize("tags", ["stratos", "r1"])
@pytest.mark.parametrize(
    ("turns", "opening"),
    [
        (TURNS, "<think>\n"),
        (TURNS, "<thinking>"),
        (TURNS, "[THINK]"),
        (TURNS, "<|begin_of_thought|>\n\n"),
        (TURNS, "Sure! "),
        # Templates whose stored answers have a thought as well.
        (TURNS.replace("m['content']", "('<think>\n\n</think>\n\n' if loop.last else '') + m['content']"), "<think>\n"),
        (TURNS.replace("m['content']", "('[R]\n[/R]\n' if loop.last else '') + m['content']"), "[R]"),
    ],
)
def test_a_template_that_begins_the_answer_is_refused_whatever_the_tags(
    tmp_path: Path, turns: str, opening: str, tags: str
) -> None:
    template = turns.replace("loop.last", "m['role'] == 'assistant'") + HEADER.replace(
        "assistant\n", f"assistant\n{opening}"
    )
    said = refusal(tmp_path, template, PLAIN.model_copy(update={"tags": tags}))
    assert f"itself begins the assistant's text with {opening.strip()!r}" in said


def test_a_thought_that_the_template_closes_again_is_its_own_affair(tmp_path: Path) -> None:
    """As Qwen3's template writes where thinking is switched off, and in stored answers."""
    empty = "<think>\n\n</think>\n\n"
    stored = TURNS.replace("m['content']", f"('{empty}' if m['role'] == 'assistant' else '') + m['content']")
    for number, template in enumerate((stored + HEADER, TURNS + HEADER.replace("assistant\n", f"assistant\n{empty}"))):
        assert teacher_format(with_template(tmp_path / str(number), template), PLAIN)


def test_a_template_is_told_one_date_which_the_configuration_records(tmp_path: Path) -> None:
    dated = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y %H:%M:%S.%f') + '<|im_end|>\n' }}"
    folder = with_template(tmp_path, dated + TURNS + HEADER)

    def prompt(prompts: PromptConfig) -> str:
        teacher = teacher_format(folder, prompts)
        return teacher.tokenizer.decode(teacher.prompt(Problem("p", "2 + 2?", "4")).token_ids.tolist())

    assert prompt(PLAIN) == prompt(PLAIN)
    assert prompt(PLAIN).startswith("<|im_start|>system\nToday: 26 Jul 2024 00:00:00.000000<|im_end|>")
    assert "Today: 01 Feb 2023 " in prompt(PLAIN.model_copy(update={"date": datetime.date(2023, 2, 1)}))
    assert load_tokenizer(folder).date == PLAIN.date == TEMPLATE_DATE


def test_a_row_whose_question_the_template_takes_apart_is_refused(tmp_path: Path) -> None:
    """Some templates treat only certain texts in another way."""
    cut = TURNS.replace("m['content']", "m['content'].split('/no_think')[0]")
    student = student_format(with_template(tmp_path, cut + HEADER), PLAIN)
    assert len(student.solving_prompt("p", "2 + 2?", prefill_thought=True)) > 0
    with pytest.raises(ValueError, match="does not write the question '2 /no_think 2'"):
        student.solving_prompt("p", "2 /no_think 2", prefill_thought=True)
