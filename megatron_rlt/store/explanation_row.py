"""One explanation with its reward as one row, with the same columns in every file.

Text is for people; the ids are what was sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pyarrow as pa
from torch import Tensor

from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.store.parts import column_type
from megatron_rlt.types import (
    FinishReason,
    FormatFlag,
    FurtherEvidence,
    LeakMetrics,
    Reward,
    RewardEvidence,
    ScoredExplanation,
    ScoringPair,
)

VERSION, SETTINGS_KEY = 2, b"megatron_rlt.reward"
"""Version of the columns; key of the files' metadata that holds it with the settings of the rewards."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredExplanation(FurtherEvidence):
    """One row. C tokens were sampled, E of them are the explanation, the solution has S; None: not known.

    A student with another tokenizer than the teacher's has an E and S of its own, and no KL.
    """

    id: str  # of the problem
    question: str
    solution: str
    step: int | None = None  # of training, from 1
    row: int | None = None  # in the data set or input, from 1
    question_index: int  # within the step, the data set or the input: its explanations compete with each other
    explanation_index: int  # among those of its question
    explanation: str
    finish_reason: FinishReason | None = None
    flags: tuple[FormatFlag, ...]
    prompt_tokens: int
    completion_tokens: int
    explanation_tokens: int  # the first so many ids of the completion
    solution_tokens: int  # as the student reads it
    student_tokens: int  # of the student's whole sequence around the explanation
    seed: int | None = None  # of the sampling
    policy_version: int | None = None  # of the weights that sampled it
    temperature: float  # of sampling and of all log-probs
    reward: float | None = None  # None or nan: it has none
    rank: int | None = None  # by reward among those of its question, 1 is the best
    terms: Mapping[str, float | None] | None = None  # a column each: terms of the reward and what they are made of
    dropped: str | None = None  # why there is no reward; None also where none was asked for
    advantage: float | None = None
    rewards_by_student: Mapping[str, float] | None = None  # each student's own
    leaks: LeakMetrics | None = None  # a column each; of what the student read
    baseline_logprob: float | None = None  # mean over the solution's tokens without an explanation
    gain: float | None = None  # what the explanation adds to it
    teacher: str | None = None  # folder
    teacher_fingerprint: str | None = None
    student: str | None = None  # folder
    student_fingerprint: str | None = None
    control: str | None = None  # what was scored in the explanation's place
    top_p: float | None = None
    max_completion_tokens: int | None = None
    run_seed: int | None = None
    prompt_ids: Tensor | None = None  # [P] int64
    completion_ids: Tensor | None = None  # [C] int64
    control_ids: Tensor | None = None  # [E] int64: what was scored in the explanation's place
    rollout_logprobs: Tensor | None = None  # [C] float32, of the sampling engine
    old_logprobs: Tensor | None = None  # [C] float32, of the policy before the update
    teacher_explanation_logprobs: Tensor | None = None  # [E] float32
    student_explanation_logprobs: Tensor | None = None  # [E] float32
    student_solution_logprobs: Tensor | None = None  # [S] float32
    kl_per_token: Tensor | None = None  # [E] float32 by the reward's estimator; None: two tokenizers, or no reward

    @classmethod
    def of_pair(
        cls, pair: ScoringPair, *, question_index: int, explanation_index: int, temperature: float
    ) -> StoredExplanation:
        """An explanation of which only its text, its form and its lengths are known."""
        return cls(
            id=pair.problem.problem_id,
            question=pair.problem.question,
            solution=pair.problem.solution,
            question_index=question_index,
            explanation_index=explanation_index,
            explanation=pair.explanation_text,
            flags=tuple(sorted(pair.flags)),
            prompt_tokens=pair.teacher.spans[0].start,
            completion_tokens=len(pair.teacher.spans[0]),
            explanation_tokens=pair.num_explanation_tokens,
            solution_tokens=len(pair.solution_span),
            student_tokens=len(pair.student),
            temperature=temperature,
        )

    @classmethod
    def of_step(cls, step: int, one: ScoredExplanation) -> StoredExplanation:
        """What a training step, counted from 1, found out about one completion."""
        completion = one.completion
        plain = cls.of_pair(
            one.pair,
            question_index=one.question_index,
            explanation_index=one.completion_index,
            temperature=completion.temperature,
        )
        return replace(
            plain.with_reward(one.combined),
            step=step,
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            policy_version=completion.policy_version,
            advantage=one.advantage,
            rewards_by_student={name: reward.total for name, reward in one.rewards.items()},
            prompt_ids=one.prompt.token_ids,
            completion_ids=completion.token_ids,
            rollout_logprobs=completion.rollout_logprobs,
            old_logprobs=one.old_logprobs,
        )

    @property
    def explanation_ids(self) -> Tensor | None:
        """`[E]` int64, as they were sampled."""
        return None if self.completion_ids is None else self.completion_ids[: self.explanation_tokens]

    def with_reward(self, reward: Reward) -> StoredExplanation:
        """The same with its reward and all that it follows from."""
        evidence = reward.evidence
        return replace(
            self,
            reward=reward.total,
            terms=reward.terms,
            dropped=reward.dropped,
            leaks=evidence.leaks,
            teacher_explanation_logprobs=evidence.teacher_explanation_logprobs,
            student_explanation_logprobs=evidence.student_explanation_logprobs,
            student_solution_logprobs=evidence.student_solution_logprobs,
            kl_per_token=reward.kl_per_token,
            **{name: vars(evidence)[name] for name in _FURTHER},
        )

    def evidence(self, *, exact_kl: bool) -> RewardEvidence | None:
        """What its reward was computed from, or None; `exact_kl`: the stored KL is the sum over the vocabulary."""
        if self.leaks is None:
            return None
        explained, solved = self.student_explanation_logprobs, self.student_solution_logprobs
        if explained is None or solved is None or self.teacher_explanation_logprobs is None:
            raise ValueError(
                f"{self.id}, explanation {self.explanation_index}: has a reward but not all log-probs that it is made"
                " of; copy or make the file again"
            )
        return RewardEvidence(
            student_explanation_logprobs=explained,
            student_solution_logprobs=solved,
            teacher_explanation_logprobs=self.teacher_explanation_logprobs,
            divergence=self.kl_per_token if exact_kl else None,
            flags=frozenset(self.flags),
            leaks=self.leaks,
            one_tokenizer=self.kl_per_token is not None,
            **{name: vars(self)[name] for name in _FURTHER},
        )

    @classmethod
    def from_cells(cls, cells: Mapping[str, Any]) -> StoredExplanation:
        """The row that `cells` made, with tensors for lists of tokens; columns that were not read are None."""
        own = {name: value for name, value in cells.items() if name in _FIELDS}
        finish_reason, by_student = own["finish_reason"], own["rewards_by_student"]
        own |= {
            "finish_reason": None if finish_reason is None else FinishReason(finish_reason),
            "flags": tuple(FormatFlag(flag) for flag in own["flags"]),
            "rewards_by_student": None if by_student is None else dict(by_student),
        }
        if all(cells[name] is None for name in _LEAKS):  # not scored
            return cls(**own)
        leaks = LeakMetrics(**{name: cells[name] for name in _LEAKS})
        terms = {name: value for name, value in cells.items() if name not in _FIELDS and name not in _LEAKS}
        return cls(**own, terms=terms, leaks=leaks)

    def cells(self) -> dict[str, Any]:
        """Values by column; what is not a number becomes null, infinities stay visible."""
        values = vars(self) | dict(self.terms or {}) | ({} if self.leaks is None else vars(self.leaks))
        return {name: _cell(value) for name, value in values.items() if name not in ("terms", "leaks")}


_FIELDS = {field.name for field in fields(StoredExplanation)}
_FURTHER = tuple(field.name for field in fields(FurtherEvidence))
_LEAKS = tuple(field.name for field in fields(LeakMetrics))


def explanation_schema(terms: Sequence[str], reward: RewardConfig | None) -> pa.Schema:
    """The columns of `StoredExplanation`, `terms` among them; the settings `reward` stand in the files' metadata."""
    parts = {"terms": terms, "leaks": _LEAKS}
    columns = [
        (name, pa.float64() if field.name in parts else column_type(field))
        for field in sorted(fields(StoredExplanation), key=lambda one: one.name in _FURTHER)  # these come last
        for name in parts.get(field.name, (field.name,))
    ]
    settings = {"version": VERSION, "reward": None if reward is None else reward.model_dump(mode="json")}
    return pa.schema(columns, {SETTINGS_KEY: json.dumps(settings)})


def _cell(value: Any) -> Any:  # noqa: ANN401 - one cell of any column
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Mapping):
        return [(name, _cell(one)) for name, one in value.items()]
    return None if isinstance(value, float) and math.isnan(value) else value
