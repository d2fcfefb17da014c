"""One part of `collect`'s scoring: what the student makes of explanations, or of a placebo in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlt.config.sections import Placebo
from megatron_rlt.jobs.reward.placebos import placebo_ids, placebo_pair
from megatron_rlt.jobs.reward.score_pairs import Scorer
from megatron_rlt.metrics.phases import PhaseTimer
from megatron_rlt.metrics.reduce import Tally
from megatron_rlt.prompts.pairs import PairBuilder
from megatron_rlt.rewards.rlt import why_invalid
from megatron_rlt.store.collected import PARTS, ExplanationScore, SampledExplanation
from megatron_rlt.types import ScoringPair


@dataclass(frozen=True)
class ScoringRooms:
    """Everything that scoring a part calls."""

    pairs: PairBuilder
    placebo: Placebo
    scorer: Scorer | None  # None: lengths only
    max_teacher_tokens: int  # the models' longest sequences
    max_student_tokens: int


def score_part(
    rooms: ScoringRooms,
    samples: Sequence[SampledExplanation],
    others: Sequence[SampledExplanation] | None,
    timer: PhaseTimer,
) -> list[ExplanationScore]:
    """Score explanations. Collective: every rank passes the same ones and gets all scores, in their order.

    Args:
        others: for the placebo `other_question`: what is scored in place of each of `samples`.
    """
    with timer.phase("pairs"):
        own = [rooms.pairs.pair(rooms.pairs.teacher.prompt(s.problem), s.completion) for s in samples]
        placebos = [
            placebo_ids(
                rooms.placebo,
                sample.explanation_ids,
                seed=sample.completion.seed,
                other_ids=None if others is None else others[index].explanation_ids,
            )
            for index, sample in enumerate(samples)
        ]
        read = [placebo_pair(rooms.pairs, pair, ids) for pair, ids in zip(own, placebos, strict=True)]
    lengths = [len(pair.student) for pair in own]
    if rooms.scorer is None:
        return [ExplanationScore(length, None, None, None) for length in lengths]
    too_long = [_too_long(rooms, pair) for pair in read]
    fitting = [pair for pair, reason in zip(read, too_long, strict=True) if reason is None]
    rewards = iter(rooms.scorer.rewards(fitting, timer) if fitting else ())
    scores = []
    for length, reason, placebo in zip(lengths, too_long, placebos, strict=True):
        parts = next(rewards) if reason is None else None
        dropped = reason if parts is None else why_invalid(parts)
        scores.append(ExplanationScore(length, parts, dropped, placebo))
    return scores


def scoring_metrics(scores: Sequence[ExplanationScore]) -> dict[str, float]:
    """Means over the explanations with a reward, and how many have none."""
    kept = [vars(score.parts) for score in scores if score.parts is not None and score.dropped is None]
    dropped = Counter(score.dropped for score in scores if score.dropped is not None)
    means = {name: Tally.of(parts[name] for parts in kept).mean for name in PARTS}
    return {"explanations": float(len(scores)), "dropped": float(dropped.total()), **means}


def _too_long(rooms: ScoringRooms, pair: ScoringPair) -> str | None:
    """Why a pair cannot be scored, in words that are the same for all such pairs."""
    if len(pair.student) > rooms.max_student_tokens:
        return f"longer than the student's {rooms.max_student_tokens} positions"
    if len(pair.teacher) > rooms.max_teacher_tokens:
        return f"longer than the teacher's {rooms.max_teacher_tokens} positions"
    return None
