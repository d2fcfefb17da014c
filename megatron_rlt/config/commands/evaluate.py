"""`evaluate`: how often a model answers questions rightly."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pydantic import field_validator

from megatron_rlt.config.commands.evaluation_sets import (
    GENERATED,
    NAMED_SETS,
    QUESTION_FIELD,
    CountdownConfig,
    EvaluationSet,
    QuestionColumnConfig,
    known_set,
)
from megatron_rlt.config.commands.job import AnswerKind, JobConfig
from megatron_rlt.config.fp8 import not_scoring_faults
from megatron_rlt.config.models import PAPER_TEMPERATURE, ModelConfig, Shapes, budget_faults
from megatron_rlt.config.paths import HUB, count_rows, row_file_faults
from megatron_rlt.config.plan import Plan, frozen_plans, replicas
from megatron_rlt.config.prompts import PromptConfig
from megatron_rlt.config.section import (
    Count,
    Fraction,
    NonEmptyText,
    PositiveInt,
    Seconds,
    Section,
    Temperature,
    with_home,
)


class AnswerSamplingConfig(Section):
    """How answers are sampled; an answer ends with the end-of-turn token."""

    greedy: bool = False
    """Decode greedily: one answer per question (num_samples 1); temperature and top_p are not used."""
    num_samples: Count = 1
    """Answers per question: the k of avg@k, maj@k and pass@k."""
    temperature: Temperature = PAPER_TEMPERATURE
    """Sampling temperature."""
    top_p: Fraction = 1.0
    """Nucleus sampling: probability mass kept at each step; 1.0 samples from the whole distribution."""
    max_completion_tokens: PositiveInt = 16384
    """Longest answer in tokens, with thought and end-of-turn token; a longer one counts as truncated."""
    max_batch_size: PositiveInt = 256
    """Answers decoded together per data-parallel rank."""
    max_prefill_tokens: PositiveInt = 16384
    """Prompt tokens per prefill pass, padding included; a longer prompt gets a pass of its own."""


class EvaluateConfig(JobConfig):
    """Let a model answer questions and verify the answers: avg@k, maj@k, pass@k, and a verdict per answer."""

    model: ModelConfig
    """The model that answers."""
    data: NonEmptyText
    """Questions: a .jsonl or .parquet file, hf://NAME[/CONFIGURATION][:SPLIT], aime24, math500, gpqa-diamond, or
    countdown:N:SEED (N generated problems)."""
    kind: AnswerKind | None = None
    """How answers are verified: math (math-verify), choice (a letter), countdown (exact arithmetic), exact (words).
    Required for a file or hub data set; a named set has its own."""
    columns: QuestionColumnConfig = QuestionColumnConfig()
    """Column names of a file or hub data set."""
    countdown: CountdownConfig = CountdownConfig()
    """Size of generated countdown problems."""
    question_template: NonEmptyText | None = None
    """Text of the user's message, with `{question}` where the question goes. None: the named set's own, or the bare
    question."""
    prefill_thought: bool = True
    """End the prompt with the thought's opening tag, as models trained by `sft` expect; False for other models."""
    prompts: PromptConfig = PromptConfig()
    """Tags, system prompt, prompt length."""
    sampling: AnswerSamplingConfig = AnswerSamplingConfig()
    """How answers are sampled."""
    judge_timeout_seconds: Seconds = 5.0
    """Longest CPU time of one comparison by math-verify, in seconds; an answer that takes longer is wrong."""
    questions_per_part: PositiveInt = 64
    """Questions per saved part; a resumed run continues after the last saved part."""

    @field_validator("data", mode="after")
    @classmethod
    def _expand_home_of_data(cls, value: str) -> str:
        return with_home(value)

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The model that answers."""
        return {"model": self.model}

    @property
    def evaluation_set(self) -> EvaluationSet:
        """The questions' source, kind, columns and template; the configuration must break no rule."""
        asked = known_set(self.data)
        if asked is None:
            assert self.kind is not None, "the rules ask for a kind"
            asked = EvaluationSet(self.data, self.data, self.kind, self.columns, QUESTION_FIELD)
        return asked if self.question_template is None else replace(asked, template=self.question_template)

    def path_faults(self) -> list[str]:
        faults, known = super().path_faults(), known_set(self.data)
        source = self.data if known is None else known.source
        if source is not None and source.startswith(HUB) and find_spec("datasets") is None:
            faults.append(f"data: {self.data} needs the package `datasets`; pip install 'megatron-rlt[hub]'")
        elif self._names_a_file:
            faults += row_file_faults("data", Path(self.data))
        return faults

    def faults(self, shapes: Shapes) -> list[str]:
        sampling = self.sampling
        faults = [*super().faults(shapes), *self._set_faults()]
        if sampling.greedy and sampling.num_samples > 1:
            faults.append(
                f"sampling.num_samples={sampling.num_samples}: greedy answers to one question are all equal;"
                " set num_samples=1, or greedy=false to sample"
            )
        if self.model.layout.cp > 1:
            faults.append(
                f"model.layout.cp={self.model.layout.cp}: has no effect on answers that are only sampled, where"
                " context-parallel ranks are replicas like others; leave it out"
            )
        prompt, completion = self.prompts.max_prompt_tokens, sampling.max_completion_tokens
        faults += budget_faults(shapes, prompt, completion, section="sampling")
        faults += not_scoring_faults("model", self.model.fp8, "sampled")
        smallest, largest = self.countdown.smallest_target, self.countdown.largest_target
        if smallest > largest:
            faults.append(
                f"countdown.smallest_target={smallest}: must not exceed countdown.largest_target={largest};"
                f" nearest valid: {largest}"
            )
        return faults

    def plan(self, shapes: Shapes) -> Plan:
        k, dp = self.sampling.num_samples, replicas(self.model, self.world_size)
        numbers = [("answers to each question", k)]
        part, num_questions = self.questions_per_part, self._count_questions()
        if num_questions is not None:
            part = min(part, num_questions)
            numbers += [("questions, at most", num_questions), ("answers, at most", num_questions * k)]
        numbers += [
            ("answers in a saved part", part * k),
            ("answers per data-parallel rank and part, at most", math.ceil(part * k / dp)),
            ("sampled tokens per part, at most", part * k * self.sampling.max_completion_tokens),
        ]
        return Plan(tuple(numbers), frozen_plans(self.models, shapes, self.world_size))

    @property
    def _names_a_file(self) -> bool:
        """Whether the questions come from a file that must be there: it has a folder or a suffix, a name has none."""
        is_other = known_set(self.data) is not None or self.data.startswith((HUB, GENERATED))
        return not is_other and ("/" in self.data or Path(self.data).suffix != "")

    def _count_questions(self) -> int | None:
        """Questions that it will find, good or bad; None where only reading would tell."""
        asked = self.evaluation_set
        return asked.num_generated if asked.source is None else count_rows(Path(asked.source))

    def _set_faults(self) -> list[str]:
        """Broken rules of what is asked, files left aside."""
        known, faults = known_set(self.data), []
        if known is None:
            faults += self._unknown_set_faults()
        else:
            if self.kind not in (None, known.kind):
                faults.append(f"kind={self.kind}: answers of data={self.data} are of kind {known.kind}; leave kind out")
            if self.columns != QuestionColumnConfig():
                faults.append(f"columns: has no effect on data={self.data}, whose columns are known; leave it out")
        is_generated = known is not None and known.source is None
        if not is_generated and self.countdown != EvaluateConfig.model_fields["countdown"].default:
            faults.append(f"countdown: has no effect on data={self.data}; it shapes what countdown:N:SEED generates")
        template = self.question_template
        if template is not None and QUESTION_FIELD not in template:
            faults.append(f"question_template={template!r}: must hold {QUESTION_FIELD}, where the question goes")
        return faults

    def _unknown_set_faults(self) -> list[str]:
        if self.data.startswith(GENERATED):
            return [f"data={self.data}: a generated set is countdown:N:SEED, such as countdown:200:0"]
        if not self._names_a_file and not self.data.startswith(HUB):
            names = ", ".join(NAMED_SETS)
            return [
                f"data={self.data}: no set has this name; give one of {names}, countdown:N:SEED, a .jsonl or"
                f" .parquet file, or {HUB}NAME[/CONFIGURATION][:SPLIT]"
            ]
        if self.kind is None:
            return [
                f"kind: data={self.data} does not tell how answers are verified; set math, choice, countdown or exact"
            ]
        return []
