"""Sampling: known numbers give known tokens, and a token's number depends on its seed and index only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rlt.rollout.sampling import completion_seed, most_probable, nucleus, sample, uniforms

PROBS = [0.1, 0.2, 0.3, 0.4]


def _logits(probs: list[float], rows: int) -> Tensor:
    return torch.tensor(probs).log().expand(rows, -1)


def _splitmix(seed: int, position: int) -> float:
    """SplitMix64 in Python's integers, written from the paper's definition."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    state = (mix(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    return (mix(state) >> 11) / 2**53


def test_uniforms_are_splitmix64_of_seed_and_position() -> None:
    seeds = [0, 1, 2**62 + 12345, -1, -(2**63), 2**63 - 1, 7]
    positions = [0, 1, 2, 3, 16383, 5, 0]
    numbers = uniforms(torch.tensor(seeds), torch.tensor(positions))
    assert numbers.tolist() == [_splitmix(s, p) for s, p in zip(seeds, positions, strict=True)]


def test_mixing_gives_the_published_first_output_of_splitmix64() -> None:
    # SplitMix64 seeded with 0 returns 0xE220A8397B1DCDAF first; mix(0) = 0, so that is seed 0, position 0 here.
    assert uniforms(torch.tensor([0]), torch.tensor([0])).item() == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_a_number_does_not_depend_on_its_batch() -> None:
    seeds, positions = torch.arange(100) * 7919, torch.arange(100) % 13
    together = uniforms(seeds, positions)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(seeds[order], positions[order]), together[order])
    assert torch.equal(uniforms(seeds[37:38], positions[37:38]), together[37:38])


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_numbers_of_neighbouring_counters_are_uniform_and_uncorrelated(axis: str) -> None:
    count, zeros = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    numbers = uniforms(count, zeros) if axis == "seeds" else uniforms(zeros, count)
    # Standard errors: mean sqrt(1/12/20000) = 0.0020, tenths sqrt(0.09/20000) = 0.0021, correlation 0.0071.
    assert abs(numbers.mean().item() - 0.5) < 4 * 0.0021
    tenths = torch.histc(numbers.float(), bins=10, min=0.0, max=1.0) / 20_000
    assert (tenths - 0.1).abs().max().item() < 4 * 0.0021
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].item()) < 4 * 0.0071


def test_completion_seeds_differ_in_every_argument() -> None:
    seeds = {completion_seed(r, s, q, c) for r in range(6) for s in range(6) for q in range(6) for c in range(6)}
    assert len(seeds) == 6**4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_known_numbers_give_known_tokens() -> None:
    # Cumulative 0.1, 0.3, 0.6, 1.0: a token's interval is closed below and open above.
    numbers = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = sample(_logits(PROBS, 8), temperature=1.0, top_p=1.0, uniforms=numbers)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = [math.log(PROBS[token]) for token in tokens.tolist()]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=1e-6, rtol=0)


def test_temperature_is_applied_to_choice_and_logprob() -> None:
    # T = 0.5 squares the odds: 1, 4, 9, 16 of 30; cumulative .0333, .1667, .4667, 1.
    numbers = torch.tensor([0.03, 0.04, 0.16, 0.17, 0.46, 0.47], dtype=torch.float64)
    tokens, logprobs = sample(_logits(PROBS, 6), temperature=0.5, top_p=1.0, uniforms=numbers)
    assert tokens.tolist() == [0, 1, 1, 2, 2, 3]
    expected = torch.tensor([1 / 30, 4 / 30, 4 / 30, 9 / 30, 9 / 30, 16 / 30]).log()
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=0)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]] * 4)
    numbers = torch.tensor([0.0, 0.4999, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature=1.0, top_p=1.0, uniforms=numbers)
    assert tokens.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logprobs, torch.full((4,), math.log(0.5)))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [False, False, False, True]),  # 0.4 alone reaches 0.3
        (0.5, [False, False, True, True]),
        (0.75, [False, True, True, True]),
        (0.95, [True, True, True, True]),
        (1e-9, [False, False, False, True]),  # never empty
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(top_p: float, kept: list[bool]) -> None:
    assert nucleus(_logits(PROBS, 1), top_p).tolist() == [kept]


def test_of_equally_probable_tokens_the_nucleus_takes_the_lower_ids() -> None:
    assert nucleus(_logits([0.25] * 4, 1), 0.45).tolist() == [[True, True, False, False]]


def test_draw_and_logprob_are_renormalised_within_the_nucleus() -> None:
    # top_p 0.5 keeps 0.3 and 0.4 (ids 2, 3): 3/7 and 4/7, cumulative .4286, 1.
    numbers = torch.tensor([0.0, 0.42, 0.43, 0.99], dtype=torch.float64)
    tokens, logprobs = sample(_logits(PROBS, 4), temperature=1.0, top_p=0.5, uniforms=numbers)
    assert tokens.tolist() == [2, 2, 3, 3]
    torch.testing.assert_close(logprobs, torch.tensor([3 / 7, 3 / 7, 4 / 7, 4 / 7]).log(), atol=1e-6, rtol=0)


def test_greedy_takes_the_largest_logit_and_the_lowest_of_equals() -> None:
    tokens, logprobs = most_probable(torch.log(torch.tensor([PROBS, [0.3, 0.3, 0.2, 0.2]])), temperature=1.0)
    assert tokens.tolist() == [3, 0]
    torch.testing.assert_close(logprobs, torch.tensor([0.4, 0.3]).log(), atol=1e-6, rtol=0)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    numbers = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature=0.7, top_p=1.0, uniforms=numbers)
    expected = torch.log_softmax(logits.float() / 0.7, dim=-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, expected)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_of_a_large_vocabulary_are_drawn_as_each_alone(top_p: float) -> None:
    """Seven rows of 40,000 ids go through the CPU in blocks of three, the last of one row: the same bits."""
    generator = torch.Generator().manual_seed(8)
    logits = 3 * torch.randn(7, 40_000, generator=generator)
    numbers = torch.rand(7, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample(logits, temperature=0.7, top_p=top_p, uniforms=numbers)
    assert len(set(tokens.tolist())) == 7
    for row in range(7):
        alone = sample(logits[row : row + 1], temperature=0.7, top_p=top_p, uniforms=numbers[row : row + 1])
        assert (tokens[row], logprobs[row]) == (alone[0][0], alone[1][0])
