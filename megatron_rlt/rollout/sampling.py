"""Samples the next token: counter-based randomness, temperature, nucleus, inverse transform.

A token's random number is a hash of its completion's seed and its index. So a completion is a function of the weights,
its prompt and its seed: the rest of the batch changes nothing beyond the rounding of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Increment and multipliers of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
# OOPSLA 2014), as unsigned numbers; torch has signed 64-bit arithmetic only, which wraps to the same bits.
_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB
_MASK = 2**64 - 1

# Logits per block of rows where a CPU draws: its few temporaries, in float64 too, then fit a core's cache. Measured
# for 64 rows of 32,000: a quarter of the time of all rows at once, whose temporaries are mapped anew for every token.
_CPU_BLOCK = 2**17


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per pair of `seeds` `[B]` int64 and token index `positions` `[B]` int64: `[B]` float64.

    Source: SplitMix64's output function at counter `positions` of the stream that `mix(seed)` starts.
    """
    bits = _mix(_mix(seeds) + (positions + 1) * _signed(_INCREMENT))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53  # 53 bits: every value is exact in float64


def completion_seed(run_seed: int, step: int, question_index: int, completion_index: int) -> int:
    """The seed of one completion, in [0, 2**63): equal in every layout, different for every argument."""
    state = 0
    for value in (run_seed, step, question_index, completion_index):
        state = _mix_integer((state + value + _INCREMENT) & _MASK)
    return state >> 1


def sample(logits: Tensor, *, temperature: float, top_p: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row of `logits` `[B, V]`, with the row's number from `uniforms` `[B]` float64.

    Returns token ids `[B]` int64 and their log-probs `[B]` float32 under the distribution they were sampled from: at
    `temperature`, and within the nucleus where `top_p < 1`. The token is the first, in id order, at which the
    cumulative probability exceeds the number.
    """
    height = max(1, _CPU_BLOCK // logits.size(1)) if logits.device.type == "cpu" else max(1, len(logits))
    blocks = zip(torch.split(logits, height), torch.split(uniforms, height), strict=True)
    drawn = [_sample_rows(rows, numbers, temperature=temperature, top_p=top_p) for rows, numbers in blocks]
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logprobs for _, logprobs in drawn])


def _sample_rows(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1.0:
        logprobs = torch.log_softmax(logprobs.masked_fill(~nucleus(logprobs, top_p), float("-inf")), dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # A product rounded up to the total would select nothing.
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # The last id only where logits are NaN: its log-prob says so, while an id outside would end a GPU's process.
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.size(1) - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Mask `[B, V]` of the smallest set of most probable tokens whose mass reaches `top_p`; ties go to the lower id.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, equation 2.
    """
    descending, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    probs = descending.double().exp()
    mass_before = probs.cumsum(dim=-1) - probs
    kept = mass_before < top_p
    kept[:, 0] = True  # even where rounding leaves nothing
    return torch.zeros_like(kept).scatter(1, order, kept)


def most_probable(logits: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Greedy ids `[B]` int64 of `logits` `[B, V]`, the lowest of equals; log-probs `[B]` float32 at `temperature`."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    tokens = logits.argmax(dim=-1, keepdim=True)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift_right(values, 30)) * _signed(_FIRST_MULTIPLIER)
    values = (values ^ _shift_right(values, 27)) * _signed(_SECOND_MULTIPLIER)
    return values ^ _shift_right(values, 31)


def _mix_integer(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST_MULTIPLIER) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND_MULTIPLIER) & _MASK
    return value ^ (value >> 31)


def _shift_right(values: Tensor, places: int) -> Tensor:
    """Shift in zeros; torch's own `>>` on int64 repeats the sign."""
    return torch.bitwise_and(values >> places, 2 ** (64 - places) - 1)


def _signed(value: int) -> int:
    """The signed 64-bit integer with the bits of the unsigned `value`."""
    return value - 2**64 if value >= 2**63 else value
