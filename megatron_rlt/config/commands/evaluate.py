"""TODO megatron_rlt/config/commands/evaluate.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_rlt.config.commands.job import AnswerKind, JobConfig
from megatron_rlt.config.commands.path_rules import _model_faults, _row_file_faults, _run_faults
from megatron_rlt.config.plan import Plan, _model_plan, _replicas
from megatron_rlt.config.rules import Shapes, _length_faults, layout_faults
from megatron_rlt.config.sections import (
    AnswerSamplingConfig,
    CountdownConfig,
    ModelConfig,
    NonEmptyText,
    PositiveFloat,
    PositiveInt,
    PromptConfig,
    Section,
)


class QuestionColumnConfig(Section):
    """Names of the columns of questions whose answers can be checked."""

    question: str = "question"
    """Column of the question; countdown rows may do without."""
    answer: str = "answer"
    """Column of the reference answer; countdown rows may do without."""
    problem_id: str = "id"
    """Column of a unique id; where absent, the row's position is the id."""
    choices: str = "choices"
    """Column of a list of choices (kind choice); where absent, the question states them itself."""
    wrong_answers: tuple[str, ...] = ()
    """Columns of wrong choices (kind choice), shuffled with `answer` in an order that depends on the question alone."""
    numbers: str = "numbers"
    """Column of a list of numbers (kind countdown), from which and `target` a question is made where there is none."""
    target: str = "target"
    """Column of the target (kind countdown)."""


class EvaluateConfig(JobConfig):
    """`megatron-rlt evaluate`: how often a model answers questions rightly."""

    model: ModelConfig
    """The model that answers."""
    data: NonEmptyText
    """A .jsonl or .parquet file, hf://NAME[/CONFIGURATION][:SPLIT], aime24, math500, gpqa-diamond, countdown:N:SEED."""
    kind: AnswerKind | None = None
    """How answers are judged: math (math-verify), choice (a letter), countdown (exact arithmetic), exact (words)."""
    columns: QuestionColumnConfig = QuestionColumnConfig()
    """Column names of a file or hub data set."""
    countdown: CountdownConfig = CountdownConfig()
    """Size of generated countdown problems."""
    question_template: NonEmptyText | None = None
    """The user's turn with `{question}` where the question goes; None takes the set's own, `{question}` for a file."""
    prefill_thought: bool = True
    """End the prompt with the thought's opening tag, as models trained by `sft` expect; False for other models."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompt, prompt length."""
    sampling: AnswerSamplingConfig = AnswerSamplingConfig()
    """Sampling of answers."""
    judge_timeout_seconds: PositiveFloat = 5.0
    """Processor time for one comparison by math-verify; an answer that takes longer is wrong."""
    questions_per_part: PositiveInt = 64
    """Questions answered between two saves; a run started again continues after the last save."""


def evaluate_faults(config: EvaluateConfig, shapes: Shapes) -> list[str]:
    """Broken rules of `evaluate`."""
    sampling, faults = config.sampling, data_faults(config)
    if sampling.greedy and sampling.num_samples > 1:
        faults.append(
            f"sampling.num_samples={sampling.num_samples}: greedy answers to one question are all equal;"
            " set num_samples=1, or greedy=false to sample"
        )
    if config.model.layout.cp > 1:
        faults.append(
            f"model.layout.cp={config.model.layout.cp}: has no effect on answers that are only sampled, where"
            " context-parallel ranks are replicas like others; leave it out"
        )
    tokens = config.prompts.max_prompt_tokens + sampling.max_completion_tokens
    return [
        *layout_faults({"model": config.model}, shapes, config.world_size),
        *faults,
        *_length_faults(
            shapes,
            tokens,
            what=f"prompts.max_prompt_tokens + sampling.max_completion_tokens = {config.prompts.max_prompt_tokens}"
            f" + {sampling.max_completion_tokens} = {tokens}",
            remedy="lower sampling.max_completion_tokens or prompts.max_prompt_tokens",
        ),
        *_countdown_faults(config.countdown),
    ]


def _countdown_faults(countdown: CountdownConfig) -> list[str]:
    if countdown.smallest_target <= countdown.largest_target:
        return []
    return [
        f"countdown.smallest_target={countdown.smallest_target}: must not exceed"
        f" countdown.largest_target={countdown.largest_target}; nearest valid: {countdown.largest_target}"
    ]


def evaluate_path_faults(config: EvaluateConfig) -> list[str]:
    """Broken rules about the files of `evaluate`."""
    faults = [*_model_faults({"model": config.model}), *_run_faults(config)]
    if needs_hub(config) and find_spec("datasets") is None:
        faults.append(f"data: {config.data} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
    elif is_file(config):
        faults += _row_file_faults("data", Path(config.data))
    return faults


def plan_evaluate(config: EvaluateConfig, shapes: Shapes, *, num_questions: int | None) -> Plan:
    """The plan of `evaluate`; the configuration must break no rule.

    Args:
        num_questions: of the set; None where only reading it would tell, then numbers that need it are left out.
    """
    k, dp = config.sampling.num_samples, _replicas(config.model, config.world_size)
    numbers = [("answers to each question", k)]
    part = config.questions_per_part
    if num_questions is not None:
        part = min(part, num_questions)
        numbers += [("questions, at most", num_questions), ("answers, at most", num_questions * k)]
    numbers += [
        ("answers in a saved part", part * k),
        ("answers per data-parallel rank and part, at most", math.ceil(part * k / dp)),
        ("sampled tokens per part, at most", part * k * config.sampling.max_completion_tokens),
    ]
    model = _model_plan("model", config.model, shapes["model"], config.world_size, use="frozen")
    return Plan(tuple(numbers), (model,))


# What `evaluate` asks: the sets known by name, generated ones, files and hub data sets, read from one line of text.
#
# In: a configuration's `data`, `kind`, `columns` and `question_template`. Out: an `EvaluationSet`, or the lines that
# say
# what is wrong. Looks at no file and no network; reading the rows is `data/exercises.py`'s.
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
