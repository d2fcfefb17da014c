import pytest
from pydantic import ValidationError

from megatron_rlt.config.prompts import PromptConfig, TagsConfig
from megatron_rlt.prompts.tags import R1, STRATOS, student_system, tag_set, teacher_system

SHORT = TagsConfig(thought_open="<exp>", solution_open="<sol>", explanation_open="<exp>", explanation_close="</exp>")


def test_stratos_and_r1_write_the_papers_strings() -> None:
    assert STRATOS.teacher_prefill == "<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n"
    assert STRATOS.teacher_end == "\n\n<|end_of_explanation|>"
    assert STRATOS.student_bridge == "<|end_of_thought|>\n\n<|begin_of_solution|>"
    assert R1.student_bridge == "</think>\n\n<solution>"


def test_configuration_chooses_a_named_set_unless_it_brings_its_own() -> None:
    assert tag_set(PromptConfig()) == STRATOS
    assert tag_set(PromptConfig(tags="r1")) == R1
    own = tag_set(PromptConfig(tags="r1", custom_tags=SHORT.model_copy(update={"separator": " "})))
    assert own.teacher_prefill == " <exp> "
    assert own.student_bridge == " <sol>"
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
    for tag in (own.thought_open, own.thought_close, own.solution_open, own.solution_close):
        assert tag in student_system(prompts)


def test_a_configured_system_prompt_stands_as_it_is_and_an_empty_one_is_none() -> None:
    prompts = PromptConfig(teacher_system=r"Use \frac{1}{2} {freely}", student_system="")
    assert teacher_system(prompts) == r"Use \frac{1}{2} {freely}"
    assert student_system(prompts) == ""
