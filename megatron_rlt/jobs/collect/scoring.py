"""Scores explanations part by part, sampled or read from a file, into one file; `collect` and `score` share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rlt.config.reward import Control as Control
from megatron_rlt.config.reward import RewardConfig
from megatron_rlt.jobs.reward.controls import control_ids, control_pair
from megatron_rlt.jobs.reward.scorer import Scorer, score_pairs, shown_terms
from megatron_rlt.jobs.run.part_loop import PartRun
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.ranking import ranks_within
from megatron_rlt.rewards.terms import LABELS, solution_values
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.store.explanation_row import StoredExplanation
from megatron_rlt.store.parts import PartStore
from megatron_rlt.types import Reward, RewardEvidence, ScoringPair

RATE = "explanations_per_second"

GAIN_LABELS = {"baseline_logprob": "baseline: mean without explanation", "gain": "gain by the explanation"}
"""Stored values beside the terms of the reward, with their labels for people."""


@dataclass(frozen=True)
class ScoringContext:
    """Models, engines and settings of the scoring."""

    pairs: PairBuilder
    control: Control
    teacher: LogprobEngine | None  # both None: only lengths are found out
    student: Scorer | None
    max_teacher_tokens: int  # the models' longest sequences
    max_student_tokens: int


@dataclass(frozen=True, eq=False)
class Explanation:
    """One explanation on its way to a reward."""

    row: StoredExplanation  # what is known of it so far
    pair: ScoringPair  # as both models read it without a control
    control_seed: int
    other_ids: Tensor | None  # explanation of another question; only for the control `other_question`


ExplanationSource = Callable[[int, PhaseTimer], Sequence[Explanation]]
"""The explanations of the part of a number; asked for in order, the same on every rank. Collective."""


def score_all(
    load: Callable[[], ScoringContext],
    source: ExplanationSource,
    store: PartStore,
    run: PartRun,
    *,
    title: str,
    folder: Path,
    num_done: int,
    num_parts: int,
) -> bool:
    """Score the parts that are not scored, and write one file of all; False if the run was asked to end. Collective.

    `load` loads the models, if there is something left to score; `title` and `folder` as `PartRun.run`.
    """
    is_writer = dist.get_rank() == 0
    if num_done < num_parts:
        context = load()
        has_baseline = context.student is not None and context.student.with_baseline
        names = ("reward", *LABELS, *(GAIN_LABELS if has_baseline else ()))
        shown = (RATE,) if context.student is None else (*shown_terms(context.pairs), RATE)

        def take_part(number: int, timer: PhaseTimer) -> dict[str, float]:
            started = time.monotonic()
            rows = score_part(context, source(number, timer), timer)
            with timer.phase("write"):
                if is_writer:
                    store.write(number, [row.cells() for row in rows])
            return scoring_metrics(rows, names) | {RATE: len(rows) / (time.monotonic() - started)}

        if not run.run(take_part, title=title, folder=folder, num_done=num_done, num_parts=num_parts, shown=shown):
            return False
    if is_writer:
        found = [row for number in range(num_parts) for row in store.read(number, ("question_index", "reward"))]
        ranks = ranks_within([row["question_index"] for row in found], [row["reward"] for row in found])
        store.join(num_parts, {"rank": ranks})
    return True


def score_part(
    context: ScoringContext, explanations: Sequence[Explanation], timer: PhaseTimer
) -> list[StoredExplanation]:
    """Score explanations. Collective: every rank passes the same ones and gets all rows, in their order."""
    if context.teacher is None or context.student is None:
        return [one.row for one in explanations]
    with timer.phase("pairs"):
        read = [pair_to_read(context.pairs, context.control, one) for one in explanations]
    too_long = [_too_long(context, pair) for pair, _ in read]
    fitting = [pair for (pair, _), reason in zip(read, too_long, strict=True) if reason is None]
    rewards = iter(score_pairs(context.teacher, context.student, fitting, timer) if fitting else ())
    rows = []
    for one, (_, ids), reason in zip(explanations, read, too_long, strict=True):
        row = replace(one.row, control_ids=ids)
        rows.append(_rewarded(row, next(rewards)) if reason is None else replace(row, dropped=reason))
    return rows


def pair_to_read(pairs: PairBuilder, control: Control, one: Explanation) -> tuple[ScoringPair, Tensor | None]:
    """What both models read, and the ids of the control in the explanation's place; None without a control."""
    ids = control_ids(control, one.pair.explanation_ids, seed=one.control_seed, other_ids=one.other_ids)
    return control_pair(pairs, one.pair, ids), ids


def scoring_metrics(rows: Sequence[StoredExplanation], names: Sequence[str]) -> dict[str, float]:
    """Means of `names` over the explanations with a reward, and how many have none."""
    kept = [vars(row) | dict(row.terms) for row in rows if row.terms is not None and row.dropped is None]
    return {
        "explanations": float(len(rows)),
        "dropped": float(sum(row.dropped is not None for row in rows)),
        **{name: Tally.of(values[name] for values in kept if values[name] is not None).mean for name in names},
    }


def _rewarded(row: StoredExplanation, reward: Reward) -> StoredExplanation:
    baseline, gain = gain_of(reward.evidence)
    return replace(row.with_reward(reward), baseline_logprob=baseline, gain=gain)


def gain_of(evidence: RewardEvidence) -> tuple[float | None, float | None]:
    """Mean log-prob of the solution's tokens without an explanation, and what the explanation adds; or None twice."""
    baseline = evidence.baseline_solution_logprobs
    if baseline is None:
        return None, None
    alone = replace(evidence, student_solution_logprobs=baseline)
    _, mean, _ = solution_values(alone, None, RewardConfig())
    _, gain, _ = solution_values(evidence, None, RewardConfig(solution_unit="gain"))
    return mean, gain


def _too_long(context: ScoringContext, pair: ScoringPair) -> str | None:
    """Why a pair cannot be scored, in words that are the same for all such pairs."""
    if len(pair.student) > context.max_student_tokens:
        return f"longer than the student's {context.max_student_tokens} positions"
    if len(pair.teacher) > context.max_teacher_tokens:
        return f"longer than the teacher's {context.max_teacher_tokens} positions"
    return None
