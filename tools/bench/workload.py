"""What the benches run on: a random Llama folder of a set size, and sequences of explanations and solutions."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rlt.parallel.platform import start_distributed
from megatron_rlt.types import Span, SpannedSequence


class NeverStop:
    """A stop condition that lets every completion go on."""

    stop_ids: frozenset[int] = frozenset()
    end_tag = None

    def __call__(self, sampled_ids: Sequence[int]) -> bool:
        del sampled_ids
        return False


def start_single_rank(port: int = 29511) -> None:
    """Make this process a job of one rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_distributed(timeout_seconds=600)


def save_random_model(folder: Path, *, hidden_size: int, num_layers: int, vocab_size: int, dtype: torch.dtype) -> Path:
    """A Llama with random weights, 64-wide heads, a quarter as many kv heads and a gated MLP of 8/3 the width."""
    num_heads = hidden_size // 64
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8 / 3 / 64) * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 4, min(num_heads, 2)),  # two, so that TP2 can cut them
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return folder


def lognormal_lengths(count: int, *, shortest: int, longest: int) -> tuple[int, ...]:
    """Evenly spaced quantiles of a log-normal whose 2-sigma range ends at `shortest` and `longest`, in random order.

    Quantiles instead of draws: a shortened run has the same distribution as a long one.
    """
    middle, spread = math.log(shortest * longest) / 2, math.log(longest / shortest) / 4
    normal = statistics.NormalDist(middle, spread)
    lengths = [round(math.exp(normal.inv_cdf((index + 0.5) / count))) for index in range(count)]
    random.Random(0).shuffle(lengths)
    return tuple(min(max(length, shortest), longest) for length in lengths)


def completions(lengths: Sequence[int], *, vocab_size: int) -> list[SpannedSequence]:
    """Random tokens; of each sequence a tenth is prompt, the rest explanation (7/10) and solution (1/5)."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        prompt, solution = max(length // 10, 1), max(length // 5, 1)
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        made.append(SpannedSequence(ids, (Span(prompt, length - solution), Span(length - solution, length))))
    return made
