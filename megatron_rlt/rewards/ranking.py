"""Which explanation of a question is best, and how that changes when rewards are computed otherwise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankingChange:
    """What another reward does to the rankings within questions."""

    num_questions: int
    num_with_choice: int  # questions with two explanations or more that have both rewards
    best_changed: float  # share of these whose best explanation is another one; nan of none
    mean_correlation: float  # Spearman's, mean over those of them where it is defined; nan of none


def ranks_within(questions: Sequence[Hashable], rewards: Sequence[float | None]) -> list[int | None]:
    """The rank of each reward within its question, 1 the largest; equals keep their order, None has no rank."""
    ranks: list[int | None] = [None] * len(rewards)
    for members in _members(questions, rewards):
        ordered = sorted(members, key=lambda index: -_number(rewards[index]))
        for place, index in enumerate(ordered, start=1):
            ranks[index] = place
    return ranks


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; nan where all values of one side are equal."""
    a, b = _shared_ranks(first), _shared_ranks(second)
    middle = (len(a) + 1) / 2
    covariance = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b)
    return covariance / math.sqrt(spread) if spread > 0 else math.nan


def compare_rankings(
    questions: Sequence[Hashable], old: Sequence[float | None], new: Sequence[float | None]
) -> RankingChange:
    """Compare two rewards of the same explanations, over those that have both."""
    both = [None if was is None else now for was, now in zip(old, new, strict=True)]
    changed, correlations = [], []
    for members in _members(questions, both):
        if len(members) < 2:
            continue
        was, now = ([_number(rewards[index]) for index in members] for rewards in (old, new))
        changed.append(was.index(max(was)) != now.index(max(now)))
        correlations.append(rank_correlation(was, now))
    return RankingChange(
        num_questions=len(set(questions)),
        num_with_choice=len(changed),
        best_changed=_mean([float(one) for one in changed]),
        mean_correlation=_mean([value for value in correlations if not math.isnan(value)]),
    )


def _members(questions: Sequence[Hashable], rewards: Sequence[float | None]) -> list[list[int]]:
    """The indices of each question's explanations that have a reward."""
    groups: dict[Hashable, list[int]] = {}
    for index, (question, reward) in enumerate(zip(questions, rewards, strict=True)):
        if reward is not None:
            groups.setdefault(question, []).append(index)
    return list(groups.values())


def _shared_ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [less + (same + 1) / 2 for less, same in zip(below, equal, strict=True)]


def _number(reward: float | None) -> float:
    assert reward is not None, "only rewards are ranked"
    return reward


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
