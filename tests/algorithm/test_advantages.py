"""Group advantages and the share of their variance, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_rlt.algorithm.advantages import (
    advantage_variance_shares,
    group_advantages,
    is_within_noise,
    within_group_std,
)

NAN = float("nan")


def advantages_of(
    rewards: list[float], valid: list[bool] | None = None, *, normalize_std: bool = True, spread: float = 0.0
) -> list[float]:
    mask = torch.tensor(valid if valid is not None else [True] * len(rewards))
    values: list[float] = group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        mask,
        normalize_std=normalize_std,
        std_epsilon=1e-4,
        smallest_spread=spread,
    ).tolist()
    return values


def test_advantages_by_hand_with_the_unbiased_std() -> None:
    """Mean 2; squared distances 1 + 0 + 1 over 3 - 1: std 1."""
    assert advantages_of([1.0, 2.0, 3.0]) == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001], abs=1e-12)


def test_without_std_only_the_mean_is_taken_off() -> None:
    assert advantages_of([1.0, 2.0, 6.0], normalize_std=False) == [-2.0, -1.0, 3.0]


@pytest.mark.parametrize("invalid", [NAN, float("inf"), 1e30])
def test_an_invalid_completion_gets_nothing_and_leaves_the_others_alone(invalid: float) -> None:
    """With the reference's way one nan made the whole group nan."""
    dropped = advantages_of([1.0, invalid, 2.0, 3.0], [True, False, True, True])
    assert dropped == pytest.approx([-1 / 1.0001, 0.0, 0.0, 1 / 1.0001], abs=1e-12)


@pytest.mark.parametrize("valid", [[False, False, False], [False, True, False]])
def test_fewer_than_two_valid_completions_teach_nothing(valid: list[bool]) -> None:
    assert advantages_of([1.0, 2.0, NAN], valid) == [0.0, 0.0, 0.0]


def test_equal_rewards_teach_nothing() -> None:
    assert advantages_of([-0.1] * 7) == pytest.approx([0.0] * 7, abs=1e-10)


def test_a_nan_that_claims_to_be_valid_is_refused() -> None:
    with pytest.raises(AssertionError, match="finite reward"):
        advantages_of([1.0, NAN])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_within_the_noise_teaches_nothing(normalize_std: bool) -> None:
    """The valid rewards 1, 2, 3 have the standard deviation 1; the fourth would make it larger."""
    rewards, valid = [1.0, 2.0, 3.0, 9.0], [True, True, True, False]
    exact = advantages_of(rewards, valid, normalize_std=normalize_std)
    assert advantages_of(rewards, valid, normalize_std=normalize_std, spread=1.0) == exact != [0.0] * 4
    assert advantages_of(rewards, valid, normalize_std=normalize_std, spread=1.001) == [0.0] * 4


def test_one_valid_completion_has_no_spread_to_judge() -> None:
    assert not is_within_noise(torch.tensor([1.0, NAN]), torch.tensor([True, False]), smallest_spread=5.0)


def test_noise_is_what_a_group_does_not_share() -> None:
    """Squares about the means: 0, then 1 + 1, then 4 + 0 + 4, over 1 + 1 + 2; one alone has no mean to miss."""
    errors = [torch.tensor(group) for group in ([7.0, 7.0], [1.0, -1.0], [0.0, 2.0, 4.0], [9.0], [])]
    assert within_group_std(errors) == pytest.approx((10 / 4) ** 0.5)
    assert within_group_std([torch.tensor([3.0])]) == 0.0


def test_equally_good_explanations_seldom_pass_twice_the_noise() -> None:
    """Chi-square with 7 degrees of freedom is above 4 x 7 with probability 2.2e-4; at once the noise in about half."""
    noise = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.ones(8, dtype=torch.bool)
    share = {
        factor: sum(not is_within_noise(group, valid, smallest_spread=factor) for group in noise) / len(noise)
        for factor in (1.0, 2.0)
    }
    assert share[2.0] < 1e-3
    assert 0.4 < share[1.0] < 0.5


def shares(
    terms: dict[str, list[float]], groups: list[int], valid: list[bool] | None = None, *, normalize_std: bool = False
) -> dict[str, float]:
    return advantage_variance_shares(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in terms.items()},
        torch.tensor(groups),
        torch.tensor(valid if valid is not None else [True] * len(groups)),
        normalize_std=normalize_std,
        std_epsilon=1e-4,
    )


def test_variance_shares_by_hand() -> None:
    """One group. Centred: r_ss (-1, 1), r_kl (-2, 2), penalty (0, 0); reward (-3, 3).

    Covariances with the reward: r_ss 3 + 3, r_kl 6 + 6, penalty 0; the reward's variance 18: 1/3, 2/3, 0.
    """
    terms = {"r_ss": [0.0, 2.0], "r_kl": [-5.0, -1.0], "penalty": [-1.0, -1.0]}
    assert shares(terms, [4, 4]) == pytest.approx({"r_ss": 1 / 3, "r_kl": 2 / 3, "penalty": 0.0})


def test_differences_between_groups_count_for_nothing() -> None:
    """r_ss differs only between the groups, r_kl only within: all variance is r_kl's."""
    terms = {"r_ss": [0.0, 0.0, 100.0, 100.0], "r_kl": [1.0, 2.0, 3.0, 5.0]}
    assert shares(terms, [0, 0, 1, 1]) == pytest.approx({"r_ss": 0.0, "r_kl": 1.0})


def test_normalised_groups_weigh_the_same() -> None:
    """Group 0 varies by r_ss only, group 1 by r_kl only and 1,000 times more; advantages do not see the factor."""
    terms = {"r_ss": [0.0, 1.0, 0.0, 0.0], "r_kl": [0.0, 0.0, 0.0, 1000.0]}
    assert shares(terms, [0, 0, 1, 1], normalize_std=True) == pytest.approx({"r_ss": 0.5, "r_kl": 0.5}, abs=1e-3)
    assert shares(terms, [0, 0, 1, 1])["r_kl"] > 0.999


def test_shares_sum_to_one_and_skip_invalid_completions() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = {name: torch.randn(9, generator=generator).tolist() for name in ("r_ss", "r_kl", "penalty")}
    groups, valid = [0, 0, 0, 1, 1, 1, 2, 2, 2], [True] * 8 + [False]
    expected = shares(terms, groups, valid, normalize_std=True)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    terms["r_ss"][8] = NAN
    assert shares(terms, groups, valid, normalize_std=True) == expected


def test_no_variance_has_no_shares() -> None:
    assert shares({"r_ss": [1.0, 1.0], "r_kl": [2.0, 2.0]}, [0, 0]) == {"r_ss": 0.0, "r_kl": 0.0}
