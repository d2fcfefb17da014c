"""The records that rooms hand each other: what each stage of the data flow adds, as frozen dataclasses.

A record holds facts and answers questions about itself; it never computes a model's output. Token ids and
log-probs are tensors on the CPU: one step's batch is replicated on every rank, each model then works on the
share its own layout gives it. `eq=False` because comparing tensors with `==` has no single truth value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

OnProgress = Callable[[str], None]
"""Told in a few words what an engine begins to do, such as "micro-batch 3 of 8": a sign of life."""


def tell_nobody(_: str) -> None:
    """For engines that nobody watches."""


@dataclass(frozen=True)
class Problem:
    """One row of a data set."""

    problem_id: str
    question: str
    solution: str
    reasoning_trace: str | None = None


@dataclass(frozen=True)
class Span:
    """Half-open range `[start, stop)` of token positions in one sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, f"span [{self.start}, {self.stop}) runs backwards"

    def of(self, values: Tensor) -> Tensor:
        """The part of `values` (`[T, ...]`, one entry a token) that lies in the span."""
        return values[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a policy continues. The teacher's shows question and solution and opens the explanation; the solver's shows
    the question alone."""

    problem: Problem
    token_ids: Tensor  # [P] int64


class FinishReason(StrEnum):
    """Why sampling of a completion ended."""

    STOP = "stop"  # the end tag or the end of turn was sampled
    LENGTH = "length"  # the token budget ran out


@dataclass(frozen=True, eq=False)
class Completion:
    """What the sampling engine returned for one prompt, token for token."""

    token_ids: Tensor  # [C] int64, as sampled, stop tokens included
    rollout_logprobs: Tensor  # [C] float32 log-probs of the sampled tokens, at `temperature`
    temperature: float
    finish_reason: FinishReason
    seed: int
    policy_version: int


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """All completions of one prompt: the group that GRPO compares."""

    prompt: Prompt
    completions: tuple[Completion, ...]


class FormatFlag(StrEnum):
    """What can be wrong with the form of an explanation; each has a configurable penalty."""

    MISSING_END_TAG = "missing_end_tag"
    TEXT_AFTER_END_TAG = "text_after_end_tag"
    EMPTY = "empty"
    CONTAINS_TAGS = "contains_tags"
    TRUNCATED = "truncated"


@dataclass(frozen=True, eq=False)
class SpannedSequence:
    """A token sequence and the positions whose log-probs are wanted.

    The log-prob of position `t` is read from the model's output at `t - 1`, so no span may start at 0.
    """

    token_ids: Tensor  # [T] int64
    spans: tuple[Span, ...]  # ascending, disjoint

    def __post_init__(self) -> None:
        stop = 1
        for span in self.spans:
            assert span.start >= stop, f"span {span} overlaps its predecessor or starts at position 0"
            stop = max(span.stop, 1)
        assert stop <= max(len(self), 1), f"spans {self.spans} reach past {len(self)} tokens"

    def __len__(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_targets(self) -> int:
        return sum(len(span) for span in self.spans)

    @property
    def target_positions(self) -> Tensor:
        """`[N]` positions of all wanted tokens, in span order."""
        parts = [torch.arange(span.start, span.stop) for span in self.spans]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Cut `[N]` per-target values into one tensor a span."""
        return torch.split(values, [len(span) for span in self.spans])


@dataclass(frozen=True, eq=False)
class ScoringPair:
    """One completion as its teacher wrote it and as the student reads it.

    `teacher` wants the log-probs of the whole completion (one span). `student` wants two spans: explanation,
    then solution. The explanation's ids are the same sampled ids on both sides, with one exception: a student with
    another tokenizer reads the explanation's text as that tokenizer writes it (`one_tokenizer` False).
    """

    problem: Problem
    teacher: SpannedSequence
    student: SpannedSequence
    num_explanation_tokens: int  # the first so many tokens of the completion are the explanation
    flags: frozenset[FormatFlag]
    explanation_text: str  # for people: as given, or decoded; a student with another tokenizer reads decoded text
    one_tokenizer: bool = True  # False: the student's explanation has ids, and a length, of its own

    @property
    def completion_ids(self) -> Tensor:
        return self.teacher.spans[0].of(self.teacher.token_ids)

    @property
    def explanation_ids(self) -> Tensor:
        return self.completion_ids[: self.num_explanation_tokens]

    @property
    def explanation_span(self) -> Span:
        return self.student.spans[0]

    @property
    def solution_span(self) -> Span:
        return self.student.spans[1]

    @property
    def well_formed(self) -> bool:
        return not self.flags


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probs of the wanted tokens of many sequences, under one model at one temperature."""

    values: tuple[Tensor, ...]  # one [N_i] float32 a sequence, in the order of its spans
    entropy: tuple[Tensor, ...]  # one [N_i] float32 a sequence: entropy of the distribution each came from
    temperature: float

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class LeakMetrics:
    """Signs, counted in one explanation, that it gives the solution away, repeats itself, or sounds like thinking."""

    solution_overlap: float  # share of the solution's n-grams that stand in the explanation, in [0, 1]
    states_the_answer: float  # 1.0 if the answer stands in the explanation before its closing part, else 0.0
    repetition: float  # share of the explanation's n-grams that stood in it before, in [0, 1]
    epistemic_per_100_words: float  # epistemic markers, see `rewards.leaks.EPISTEMIC_MARKERS`


@dataclass(frozen=True, eq=False, kw_only=True)
class FurtherEvidence:
    """Values per token that only some rewards need; None: not computed. Each is a column of stored rewards."""

    baseline_solution_logprobs: Tensor | None = None  # [S] float32 log p_S(s | q), without an explanation


@dataclass(frozen=True, eq=False, kw_only=True)
class RewardEvidence(FurtherEvidence):
    """Everything the reward of one explanation is computed from: E explanation tokens, S solution tokens.

    A student with another tokenizer than the teacher's reads another E (`one_tokenizer` False): no KL per token.
    """

    student_explanation_logprobs: Tensor  # [E] float32 log p_S(e | q)
    student_solution_logprobs: Tensor  # [S] float32 log p_S(s | q, e)
    teacher_explanation_logprobs: Tensor  # [E] float32 log pi_T(e | q, s)
    divergence: Tensor | None  # [E] float32 exact KL(pi_T || p_S) in nats; None: not computed
    flags: frozenset[FormatFlag]
    leaks: LeakMetrics
    one_tokenizer: bool


@dataclass(frozen=True, eq=False)
class Reward:
    """The reward of one completion, its terms and the evidence it follows from."""

    total: float  # nan: the completion has no reward, `dropped` says why
    terms: Mapping[str, float]  # by the names of `rewards.terms.LABELS`; nan where a value does not exist
    kl_per_token: Tensor | None  # [E] float32 by the configured estimator; None: two tokenizers
    dropped: str | None  # why there is no reward; None: there is one
    evidence: RewardEvidence


FAILED, BAD_INPUT, ENDED_EARLY = 1, 2, 75
"""Exit statuses beside 0: a failure, the user's fault, and saved and ended by a signal (EX_TEMPFAIL)."""


class StoppedError(RuntimeError):
    """A job's own decision to end: its one line says all, and a traceback would not help."""


@dataclass(frozen=True, eq=False)
class StudentScores:
    """Student log-probs of one explanation and of the solution after it."""

    pair: ScoringPair  # in this student's format
    explanation_logprobs: Tensor  # [E] float32 log p_S(e | q)
    solution_logprobs: Tensor  # [S] float32 log p_S(s | q, e)
    baseline_logprobs: Tensor | None  # [S] float32 log p_S(s | q); None: not computed


@dataclass(frozen=True, eq=False)
class Correction:
    """What the update does about sampling log-probs that differ from the policy's; by default nothing."""

    importance: Tensor | None = None  # [C] float64 weights of the tokens in the policy loss; None: no weighting
    token_kept: Tensor | None = None  # [C] bool: tokens in the loss; None: all
    kept: bool = True  # whether the completion is in the loss


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredCompletion:
    """One completion of an RL step with everything the step found out about it, the same on every rank."""

    prompt: Prompt
    completion: Completion
    question_index: int  # of its group within the step's batch
    completion_index: int  # within its group
    sequence: SpannedSequence  # prompt and completion; one span: the completion
    old_logprobs: Tensor  # [C] float32, of the policy before the update
    old_entropy: Tensor  # [C] float32
    reference_logprobs: Tensor | None  # [C] float32; None: the loss has no reference
    correction: Correction = Correction()
    reward: float = math.nan  # nan: no reward, the completion takes no part in its group
    advantage: float = 0.0

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredExplanation(ScoredCompletion):
    """A teacher's completion with what all students make of it."""

    students: Mapping[str, StudentScores]  # by student, the first student first
    rewards: Mapping[str, Reward]  # by student; a held-out one's too
    combined: Reward  # the first student's terms; the total is that of all students that count

    @property
    def pair(self) -> ScoringPair:
        """As the teacher wrote it and the first student reads it."""
        return next(iter(self.students.values())).pair

    @property
    def leaks(self) -> LeakMetrics:
        return self.combined.evidence.leaks
