"""What a scorer's noise does to rewards, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlt.types import LeakMetrics, Reward, RewardEvidence
from tools.bench.score_noise import PARTS, Scores, compare, interval, noise_share, spearman, worse_than

NO_EVIDENCE = RewardEvidence(
    student_explanation_logprobs=torch.zeros(1),
    student_solution_logprobs=torch.zeros(1),
    teacher_explanation_logprobs=torch.zeros(1),
    divergence=None,
    one_tokenizer=True,
    flags=frozenset(),
    leaks=LeakMetrics(0.0, 0.0, 0.0, 0.0),
)


def reward(total: float) -> Reward:
    return Reward(total, dict.fromkeys(PARTS, total), None, None, NO_EVIDENCE)


def scores(totals: list[float], tokens: list[float], top: list[int]) -> Scores:
    return Scores(torch.tensor(tokens), torch.tensor(top), tuple(reward(total) for total in totals))


def test_an_error_that_a_group_shares_is_no_noise() -> None:
    exact = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert noise_share(exact + 7, exact) == pytest.approx(0.0)
    # Errors of +-1 have a standard deviation of 1, the rewards one of sqrt(5) / 2.
    assert noise_share(exact + torch.tensor([1, -1, 1, -1]), exact) == pytest.approx(2 / math.sqrt(5))


def test_rank_correlation_by_hand() -> None:
    exact = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(exact * 10, exact) == pytest.approx(1.0)
    assert spearman(-exact, exact) == pytest.approx(-1.0)
    assert spearman(torch.tensor([1.0, 3.0, 2.0, 4.0]), exact) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(torch.tensor([0.0, 0.0, 1.0, 1.0]), exact) == pytest.approx(
        4 / math.sqrt(4 * 5)
    )  # ties share ranks


def test_figures_of_two_groups() -> None:
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    exact = scores([1, 2, 3, 4, 1, 2, 3, 4], [0.0, -1.0, -2.0, -3.0], [5, 6, 7, 8])
    # In the first group the two in the middle change places, and with it the signs of their advantages.
    found = scores([1, 3, 2, 4, 1, 2, 3, 4], [0.0, -1.5, -2.0, -2.0], [5, 6, 7, 9])
    # The four tokens belong to the first explanation of each group: gaps 0 and 0.5, then 0 and 1.
    figures = compare(found, exact, groups, torch.tensor([2, 0, 0, 0, 2, 0, 0, 0]))
    assert figures["token_error"] == {"mean": 0.375, "interval": (0.25, 0.5), "p99": pytest.approx(0.985), "max": 1.0}
    assert figures["reward_rms_error"] == pytest.approx(0.5)
    assert figures["reward_noise"] == pytest.approx(math.sqrt(2 / 6))  # squares 0 + 1 + 1 + 0, and 3 + 3 free values
    assert figures["part_rms_error"] == dict.fromkeys(PARTS, pytest.approx(0.5))
    assert figures["spearman"]["mean"] == pytest.approx(0.9)  # type: ignore[index]
    assert figures["spearman"]["worst"] == pytest.approx(0.8)  # type: ignore[index]
    assert figures["noise_share"]["mean"] == pytest.approx(math.sqrt(0.5) / math.sqrt(1.25) / 2)  # type: ignore[index]
    assert figures["sign_flips"] == {"mean": 0.25, "interval": (0.0, 0.5)}
    assert figures["sign_flips_of_large"] == {"mean": 0.25, "interval": (0.0, 0.5)}
    assert figures["by_group"]["spread"] == [pytest.approx(math.sqrt(1.25))] * 2  # type: ignore[index]
    assert figures["by_group"]["noise"] == [pytest.approx(math.sqrt(0.5)), 0.0]  # type: ignore[index]
    assert figures["top1_agreement"] == 0.75
    assert worse_than(figures, {"noise": 0.4, "spearman": 0.8, "flips": 0.3}) == []
    assert worse_than(figures, {"noise": 0.1, "spearman": 0.95, "flips": 0.2}) == [
        *("noise 0.316 (limit 0.1)", "spearman 0.9 (limit 0.95)", "flips 0.25 (limit 0.2)")
    ]


def test_noise_by_length_leaves_out_what_a_group_shares() -> None:
    groups, counts = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1, 2, 3, 1, 2, 3])
    exact = scores([1, 2, 3, 1, 2, 3], [0.0] * 12, [0] * 12)
    # Errors +1, 0, -1, then the same and 5 more for all: their groups' means are 0 and 5.
    found = scores([2, 2, 2, 7, 7, 7], [0.0] * 12, [0] * 12)
    expected = [{"tokens": 1.0, "noise": 1.0}, {"tokens": 2.0, "noise": 0.0}, {"tokens": 3.0, "noise": 1.0}]
    assert compare(found, exact, groups, counts)["by_length"] == expected


def test_the_interval_of_equal_groups_is_their_value() -> None:
    assert interval(torch.full((5,), 0.25, dtype=torch.float64)) == (0.25, 0.25)
    low, high = interval(torch.tensor([0.0, 1.0] * 50, dtype=torch.float64))
    assert 0.38 < low < 0.45 < 0.55 < high < 0.62  # 0.5 +- 1.96 * 0.05
