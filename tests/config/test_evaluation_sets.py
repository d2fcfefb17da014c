"""What a name in `data` stands for."""

from __future__ import annotations

from typing import Any

from megatron_rlt.config.commands.evaluate import EvaluateConfig
from megatron_rlt.config.commands.evaluation_sets import EvaluationSet, QuestionColumnConfig


def _set(**changes: Any) -> EvaluationSet:
    return EvaluateConfig.model_validate({"output_dir": "run", "model": {"model": "m"}} | changes).evaluation_set


def test_a_known_set_brings_source_kind_columns_and_template() -> None:
    math = _set(data="math500")
    assert (math.source, math.kind, math.columns.question) == ("hf://HuggingFaceH4/MATH-500:test", "math", "problem")
    assert math.template == "Return your final response within \\boxed{}. {question}"
    gpqa = _set(data="gpqa-diamond", kind="choice", question_template="Q: {question}")
    assert (gpqa.source, gpqa.kind) == ("hf://Idavidrein/gpqa/gpqa_diamond:train", "choice")
    assert (gpqa.template, len(gpqa.columns.wrong_answers)) == ("Q: {question}", 3)
    assert _set(data="aime24").source == "hf://HuggingFaceH4/aime_2024:train"


def test_a_generated_set_carries_count_and_seed() -> None:
    assert _set(data="countdown:200:7") == EvaluationSet(
        "countdown:200:7", None, "countdown", QuestionColumnConfig(), "{question}", num_generated=200, generator_seed=7
    )


def test_a_file_is_asked_as_the_configuration_says() -> None:
    asked = _set(data="data/rows.jsonl", kind="exact", columns={"answer": "solution"})
    assert (asked.source, asked.kind, asked.template) == ("data/rows.jsonl", "exact", "{question}")
    assert asked.columns == QuestionColumnConfig(answer="solution")
