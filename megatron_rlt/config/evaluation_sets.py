"""What `evaluate` asks: the sets known by name, generated ones, files and hub data sets, read from one line of text.

In: a configuration's `data`, `kind`, `columns` and `question_template`. Out: an `EvaluationSet`, or the lines that say
what is wrong. Looks at no file and no network; reading the rows is `data/exercises.py`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rlt.config.jobs import AnswerKind, EvaluateConfig, QuestionColumnConfig

HUB = "hf://"
QUESTION_FIELD = "{question}"
_COUNTDOWN = "countdown:"
_GENERATED = re.compile(rf"{_COUNTDOWN}([1-9]\d*):(\d+)")


@dataclass(frozen=True)
class EvaluationSet:
    """Where questions come from, how they are asked, and how their answers are judged."""

    name: str
    source: str | None  # a .jsonl or .parquet file, or hf://NAME[/CONFIGURATION][:SPLIT]; None: generated
    kind: AnswerKind
    columns: QuestionColumnConfig
    template: str  # the user's turn, QUESTION_FIELD in it
    num_generated: int = 0
    generator_seed: int = 0


_BOXED = f"Return your final response within \\boxed{{}}. {QUESTION_FIELD}"
_BOXED_LETTER = (
    "Return your final response within \\boxed{} and only include the letter of the choice as your final response."
    f" {QUESTION_FIELD}"
)
_NAMED = {
    "aime24": EvaluationSet(
        "aime24", f"{HUB}HuggingFaceH4/aime_2024:train", "math", QuestionColumnConfig(question="problem"), _BOXED
    ),
    "math500": EvaluationSet(
        "math500",
        f"{HUB}HuggingFaceH4/MATH-500:test",
        "math",
        QuestionColumnConfig(question="problem", problem_id="unique_id"),
        _BOXED,
    ),
    "gpqa-diamond": EvaluationSet(
        "gpqa-diamond",
        f"{HUB}Idavidrein/gpqa/gpqa_diamond:train",
        "choice",
        QuestionColumnConfig(
            question="Question",
            answer="Correct Answer",
            problem_id="Record ID",
            wrong_answers=tuple(f"Incorrect Answer {number}" for number in (1, 2, 3)),
        ),
        _BOXED_LETTER,
    ),
}


def evaluation_set(config: EvaluateConfig) -> EvaluationSet:
    """The set of a configuration in which `data_faults` finds nothing."""
    known = _known_set(config.data)
    template = config.question_template
    if known is not None:
        name, kind, columns = known.name, known.kind, known.columns
        source, count, seed = known.source, known.num_generated, known.generator_seed
        return EvaluationSet(name, source, kind, columns, template or known.template, count, seed)
    assert config.kind is not None, "data_faults asks for a kind"
    return EvaluationSet(config.data, config.data, config.kind, config.columns, template or QUESTION_FIELD)


def data_faults(config: EvaluateConfig) -> list[str]:
    """Broken rules of what is asked, files left aside."""
    faults = []
    known = _known_set(config.data)
    if known is None:
        faults += _unknown_set_faults(config)
    else:
        if config.kind not in (None, known.kind):
            faults.append(f"kind={config.kind}: answers of data={config.data} are of kind {known.kind}; leave kind out")
        if config.columns != QuestionColumnConfig():
            faults.append(f"columns: has no effect on data={config.data}, whose columns are known; leave it out")
    is_generated = known is not None and known.source is None
    if not is_generated and config.countdown != EvaluateConfig.model_fields["countdown"].default:
        faults.append(f"countdown: has no effect on data={config.data}; it shapes what countdown:N:SEED generates")
    template = config.question_template
    if template is not None and QUESTION_FIELD not in template:
        faults.append(f"question_template={template!r}: must hold {QUESTION_FIELD}, where the question goes")
    return faults


def is_file(config: EvaluateConfig) -> bool:
    """Whether the questions come from a file that must be there: a path has a folder or a suffix, a name has none."""
    is_other = _known_set(config.data) is not None or config.data.startswith((HUB, _COUNTDOWN))
    return not is_other and ("/" in config.data or Path(config.data).suffix != "")


def needs_hub(config: EvaluateConfig) -> bool:
    """Whether the questions come from the Hugging Face hub."""
    known = _known_set(config.data)
    source = config.data if known is None else known.source
    return source is not None and source.startswith(HUB)


def _known_set(data: str) -> EvaluationSet | None:
    generated = _GENERATED.fullmatch(data)
    if generated is None:
        return _NAMED.get(data)
    count, seed = (int(digits) for digits in generated.groups())
    return EvaluationSet(data, None, "countdown", QuestionColumnConfig(), QUESTION_FIELD, count, seed)


def _unknown_set_faults(config: EvaluateConfig) -> list[str]:
    if config.data.startswith(_COUNTDOWN):
        return [f"data={config.data}: a generated set is countdown:N:SEED, such as countdown:200:0"]
    if not is_file(config) and not config.data.startswith(HUB):
        names = ", ".join(_NAMED)
        return [
            f"data={config.data}: no set has this name; give one of {names}, countdown:N:SEED, a .jsonl or"
            f" .parquet file, or {HUB}NAME[/CONFIGURATION][:SPLIT]"
        ]
    if config.kind is None:
        return [f"kind: data={config.data} does not tell how answers are judged; set math, choice, countdown or exact"]
    return []
