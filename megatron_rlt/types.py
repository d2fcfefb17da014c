"""The records that rooms hand each other: what each stage of the data flow adds, as frozen dataclasses.

A record holds facts and answers questions about itself; it never computes a model's output. Token ids and
log-probs are tensors on the CPU: one step's batch is replicated on every rank, each model then works on the
share its own layout gives it. `eq=False` because comparing tensors with `==` has no single truth value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    explanation_text: str  # decoded for people, and for a student with another tokenizer; else never encoded again
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

    @classmethod
    def joined(cls, parts: Sequence[Logprobs]) -> Logprobs:
        """Those of several lists of sequences as one, in their order; at least one list."""
        (temperature,) = {part.temperature for part in parts}
        values = tuple(row for part in parts for row in part.values)
        return cls(values, tuple(row for part in parts for row in part.entropy), temperature)


@dataclass(frozen=True)
class LeakMetrics:
    """Signs, counted in one explanation, that it gives the solution away, repeats itself, or sounds like thinking."""

    solution_overlap: float  # share of the solution's n-grams that stand in the explanation, in [0, 1]
    states_the_answer: float  # 1.0 if the answer stands in the explanation before its closing part, else 0.0
    repetition: float  # share of the explanation's n-grams that stood in it before, in [0, 1]
    epistemic_per_100_words: float  # epistemic markers, see `rewards.leaks.EPISTEMIC_MARKERS`


@dataclass(frozen=True, eq=False)
class RewardParts:
    """The reward of one completion with everything it was computed from.

    The reward is nan where solution or explanation is empty or any value is not finite. Of a student with another
    tokenizer than its teacher's there is no r_KL: all its parts are nan, `kl_per_token` is None, and the reward has no
    such term. Then E is one number for the teacher's log-probs and another for the student's.
    """

    reward: float
    r_ss: float
    r_ss_mean: float
    r_ss_min: float
    r_kl: float
    r_kl_mean: float
    r_kl_max: float
    penalty: float
    kl_per_token: Tensor | None  # [E] float32
    student_solution_logprobs: Tensor  # [S] float32
    student_explanation_logprobs: Tensor  # [E] float32
    teacher_explanation_logprobs: Tensor  # [E] float32

    @property
    def valid(self) -> bool:
        """Whether the completion may take part in its group's statistics."""
        return self.reward == self.reward and abs(self.reward) != float("inf")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Several sequences end to end: one call of a model.

    Built by `models.packing`, which owns alignment: the last entry of `lengths` may be padding that belongs
    to no sequence. Rows are positions whose hidden state predicts a wanted token. With context parallelism a rank's
    batch holds its part of the tokens (t) and the rows among them (r); without, t is T and r is R.
    """

    input_ids: Tensor  # [t] int64, T a multiple of the layout's alignment
    position_ids: Tensor  # [t] int64, restarting at 0 for every sequence
    lengths: tuple[int, ...]  # of the whole pack: sequence lengths incl. padding; sums to T
    num_tokens: int  # of the whole pack that belong to sequences, padding not counted
    sequence_indices: tuple[int, ...]  # the caller's index of each packed sequence
    rows: Tensor  # [r] int64 into t
    targets: Tensor  # [r] int64 token ids
    row_counts: tuple[int, ...]  # wanted tokens of each packed sequence; sums to R
    own_rows: Tensor | None  # [r] int64 into R: which of the pack's rows are here; None: all of them

    def join(self, per_sequence: Sequence[Tensor]) -> Tensor:
        """Pick the packed sequences' tensors (`[N_i]` each, indexed by the caller's order) and join them: `[R]`."""
        parts = [per_sequence[index] for index in self.sequence_indices]
        return torch.cat(parts) if parts else torch.empty(0)

    def split(self, per_row: Tensor) -> tuple[Tensor, ...]:
        """Cut `[R]` values into one `[N_i]` tensor for each of `sequence_indices`."""
        return torch.split(per_row, list(self.row_counts))


FAILED, BAD_INPUT, ENDED_EARLY = 1, 2, 75
"""Exit statuses beside 0: a failure, the user's fault, and saved and ended by a signal (EX_TEMPFAIL)."""


class StoppedError(RuntimeError):
    """A job's own decision to end: its one line says all, and a traceback would not help."""
