import pytest
from pydantic import ValidationError

from megatron_rlt.config.prompts import PromptConfig, TagsConfig
from megatron_rlt.prompts.tags import R1, STRATOS, student_system, tag_set, teacher_system

SHORT = TagsConfig(thought_open="<exp>", solution_open="<sol>", explanation_open="<exp>", explanation_close="</exp>")


def test_stratos_and_r1_write_the_papers_strings() -> None:
    prefill = "<|begin_of_solution|>\n\n4\n\n<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n"
    for solution in ("4", "\n\n4\n\n", "4\n", "\n4\n\n"):
        assert STRATOS.teacher_prefill(solution) == prefill
        assert R1.teacher_prefill(solution) == "<solution>\n4\n</solution>\n\n<explanation>\n"
        assert STRATOS.student_solution(solution) == "\n\n4\n\n"
        assert R1.student_solution(solution) == "4"
    assert STRATOS.teacher_end == "\n\n<|end_of_explanation|>"
    assert STRATOS.thought_opening == "<|begin_of_thought|>\n\n"
    assert STRATOS.student_bridge == "<|end_of_thought|>\n\n<|begin_of_solution|>"
    assert (R1.thought_opening, R1.thought_end, R1.student_bridge, R1.student_end) == (
        *("<think>\n", "\n"),
        *("</think>\n\n", ""),
    )


def test_only_the_newlines_that_a_tag_set_writes_are_taken_off_a_text() -> None:
    assert STRATOS.bare("\n\n\n a \n \n\n\n\n") == "\n a \n \n\n"
    assert STRATOS.bare("  a\n") == "  a"
    assert STRATOS.bare("\n\n\n") == STRATOS.bare("") == ""
    assert (
        tag_set(PromptConfig(custom_tags=SHORT.model_copy(update={"separator": "", "padding": " "}))).bare("\n a  ")
        == "\n a "
    )


def test_configuration_chooses_a_named_set_unless_it_brings_its_own() -> None:
    assert tag_set(PromptConfig()) == STRATOS
    assert tag_set(PromptConfig(tags="r1")) == R1
    custom = SHORT.model_copy(update={"separator": " ", "padding": "_"})
    own = tag_set(PromptConfig(tags="r1", custom_tags=custom))
    assert own.teacher_prefill("4") == "<sol>_4 <exp>_", "an empty closing tag has no padding"
    assert own.student_bridge == " <sol>"
    assert own.student_solution("4") == "_4"
    assert own.texts == ("<exp>", "<sol>", "<exp>", "</exp>")


@pytest.mark.parametrize("field", ["thought_open", "solution_open", "explanation_open", "explanation_close"])
def test_a_tag_that_starts_or_ends_something_must_not_be_blank(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        TagsConfig(**{**SHORT.model_dump(), field: "  "})


@pytest.mark.parametrize("tags", ["stratos", "r1"])
def test_default_system_prompts_name_the_tags_each_model_writes(tags: str) -> None:
    prompts = PromptConfig.model_validate({"tags": tags})
    own = tag_set(prompts)
    for tag in (own.solution_open, own.solution_close, own.explanation_open, own.explanation_close):
        assert tag in teacher_system(prompts)
    for tag in (own.thought_open, own.thought_close):
        assert tag in student_system(prompts)
    for tag in (own.solution_open, own.solution_close):
        assert (tag in student_system(prompts)) == (tags == "stratos"), "R1's solution has no tags"


def test_a_configured_system_prompt_stands_as_it_is_and_an_empty_one_is_none() -> None:
    prompts = PromptConfig(teacher_system=r"Use \frac{1}{2} {freely}", student_system="")
    assert teacher_system(prompts) == r"Use \frac{1}{2} {freely}"
    assert student_system(prompts) == ""
