"""Judges completions that may or may not keep to the student's format, shared over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_rlt.parallel.collectives import gather_by_index
from megatron_rlt.parallel.platform import world
from megatron_rlt.prompts.tags import TagSet
from megatron_rlt.rewards.answers import AnswerTags
from megatron_rlt.rewards.verifiable import Verdict, VerifiableKind, Verifier
from megatron_rlt.types import OnProgress, Problem


class AnswerJudge:
    """Reads the answer behind the tag that opens the solution; a completion without that tag counts as a whole.

    So models that never saw the tags can be compared with those that were trained on them.
    """

    def __init__(self, kind: VerifiableKind, tags: TagSet, *, timeout_seconds: float) -> None:
        """`timeout_seconds`: processor time for one comparison by math-verify."""
        known = answer_tags(tags)
        self._opening = known.before_solution
        self._tagged = Verifier(kind, tags=known, timeout_seconds=timeout_seconds)
        self._whole = Verifier(kind, tags=None, timeout_seconds=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes that math-verify runs in."""
        self._tagged.close()
        self._whole.close()

    def check(self, problem: Problem) -> None:
        """Raise ValueError naming the problem if no answer to it could be judged."""
        self._tagged.check(problem)

    def verdict(self, problem: Problem, completion: str) -> Verdict:
        """Judge a completion of a problem that `check` let pass."""
        verifier = self._tagged if self._opening in completion else self._whole
        return verifier.verdict(problem, completion)


def answer_tags(tags: TagSet) -> AnswerTags:
    """The tags that a student writes."""
    solution = (tags.solution_open, tags.solution_close) if tags.student_solution_tags else ("", "")
    return AnswerTags(tags.thought_open, tags.thought_close, *solution)


def judge_on_ranks(
    judge: AnswerJudge, problems: Sequence[Problem], completions: Sequence[str], on_progress: OnProgress
) -> list[Verdict]:
    """One verdict per completion. Collective on the whole job: each rank judges a share, all get all.

    A comparison at its time limit may end either way; so one rank decides it for all.
    """
    verdicts: dict[int, Verdict] = {}
    for index in range(dist.get_rank(), len(problems), dist.get_world_size()):
        on_progress(f"answer {index + 1} of {len(problems)}")
        verdicts[index] = judge.verdict(problems[index], completions[index])
    return gather_by_index(verdicts, len(problems), world())
