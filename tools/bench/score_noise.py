"""What a less exact scorer does to rewards: errors per token and per part, within-group noise, ranks, advantages.

Plain arithmetic on float64 tensors; `tools.bench.fp8` brings the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlt.algorithm.advantages import group_advantages, within_group_std
from megatron_rlt.types import Reward

PARTS = ("r_ss_mean", "r_ss_min", "r_kl_mean", "r_kl_max", "r_ss", "r_kl")
_LARGE = 0.1  # an advantage whose sign matters
_RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """One scorer's results for all explanations, in the same order for every scorer."""

    tokens: Tensor  # `[N]` log-probs of explanation and solution tokens
    top_ids: Tensor  # `[N]` most probable token at each of these places
    rewards: tuple[Reward, ...]


def compare(found: Scores, exact: Scores, groups: Tensor, token_counts: Tensor) -> dict[str, object]:
    """Every figure of one scorer against the exact one; intervals are over groups.

    Args:
        groups: `[R]` the group of each explanation.
        token_counts: `[R]` how many of the scores' tokens belong to each explanation; they sum to `N`.
    """
    gaps = (found.tokens.double() - exact.tokens.double()).abs()
    own, true = _totals(found), _totals(exact)
    members = [torch.nonzero(groups == group)[:, 0] for group in torch.unique(groups)]
    flips = [_flips(own[rows], true[rows]) for rows in members]
    noise = torch.tensor([noise_share(own[rows], true[rows]) for rows in members], dtype=torch.float64)
    ranks = torch.tensor([spearman(own[rows], true[rows]) for rows in members], dtype=torch.float64)
    by_row = torch.stack([part.sum() for part in torch.split(gaps, token_counts.tolist())])
    sums = [(by_row[rows].sum(), token_counts[rows].sum()) for rows in members]
    tokens = _ratio([(float(gap), float(count)) for gap, count in sums])
    return {
        "token_error": tokens | {"p99": float(gaps.quantile(0.99)), "max": float(gaps.max())},
        "part_rms_error": {name: _rms(_part(found, name) - _part(exact, name)) for name in PARTS},
        "reward_rms_error": _rms(own - true),
        "reward_noise": within_group_std([(own - true)[rows] for rows in members]),
        "noise_share": {"mean": float(noise.mean()), "interval": interval(noise)},
        "spearman": {"mean": float(ranks.mean()), "worst": float(ranks.min()), "interval": interval(ranks)},
        "sign_flips": _ratio([(float(one.sum()), len(one)) for one, _ in flips]),
        "sign_flips_of_large": _ratio([(float(one.sum()), len(one)) for _, one in flips]),
        "top1_agreement": float((found.top_ids == exact.top_ids).double().mean()),
        "by_length": _by_length(own - true, members, token_counts),
        "by_group": {
            "spread": [float(true[rows].std(correction=0)) for rows in members],
            "noise": [float((own - true)[rows].std(correction=0)) for rows in members],
            "spearman": ranks.tolist(),
        },
    }


def noise_share(found: Tensor, exact: Tensor) -> float:
    """Standard deviation of the error within one group over that of its exact rewards.

    An error that all of a group share moves no advantage and does not count.
    """
    return float((found - exact).std(correction=0) / exact.std(correction=0))


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two `[n]` tensors; equal values share their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def interval(values: Tensor, statistic: Callable[[Tensor], Tensor] = torch.mean) -> tuple[float, float]:
    """Bootstrap interval of 95 % of a statistic over groups; seeded."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(values), (_RESAMPLES, len(values)), generator=generator)
    resampled = torch.stack([statistic(values[pick]) for pick in picks]).double()
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def worse_than(figures: Mapping[str, object], limits: Mapping[str, float]) -> list[str]:
    """The limits that a scorer breaks: `noise` at most, `spearman` at least, `flips` (of large advantages) at most."""
    names = {"noise": "noise_share", "spearman": "spearman", "flips": "sign_flips_of_large"}
    found = {name: _mean(figures[key]) for name, key in names.items()}
    broken = {
        name: found[name] < limit if name == "spearman" else found[name] > limit for name, limit in limits.items()
    }
    return [f"{name} {found[name]:.3g} (limit {limits[name]:g})" for name, is_broken in broken.items() if is_broken]


def _flips(found: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Which advantages change their sign: among all, and among those that are large."""
    valid = torch.ones(len(exact), dtype=torch.bool)
    own, true = (
        group_advantages(rewards, valid, normalize_std=True, std_epsilon=1e-4, smallest_spread=0.0)
        for rewards in (found, exact)
    )
    flipped = torch.sign(own) != torch.sign(true)
    return flipped, flipped[true.abs() > _LARGE]


def _mean(figure: object) -> float:
    assert isinstance(figure, Mapping)
    return float(figure["mean"])


def _ratio(groups: Sequence[tuple[float, float]]) -> dict[str, object]:
    """Sum over sum of one pair a group, with its interval."""
    pairs = torch.tensor(groups, dtype=torch.float64)

    def ratio(picked: Tensor) -> Tensor:
        return picked[:, 0].sum() / picked[:, 1].sum()

    return {"mean": float(ratio(pairs)), "interval": interval(pairs, ratio)}


def _by_length(errors: Tensor, members: Sequence[Tensor], token_counts: Tensor) -> list[dict[str, float]]:
    """Noise of the shortest, middle and longest third: root mean square of errors less their group's mean."""
    centred = errors.clone()
    for rows in members:
        centred[rows] -= errors[rows].mean()
    thirds = token_counts.argsort(stable=True).chunk(3)
    return [{"tokens": float(token_counts[rows].double().mean()), "noise": _rms(centred[rows])} for rows in thirds]


def _ranks(values: Tensor) -> Tensor:
    return ((values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2).double()


def _totals(scores: Scores) -> Tensor:
    return torch.tensor([reward.total for reward in scores.rewards], dtype=torch.float64)


def _part(scores: Scores, name: str) -> Tensor:
    return torch.tensor([reward.terms[name] for reward in scores.rewards], dtype=torch.float64)


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
