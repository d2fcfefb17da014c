"""Model FLOP by hand, and as torch counts them while transformers' model runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.models.flops import decoding_flops, forward_flops, scoring_flops, update_flops
from megatron_rlt.types import Span, SpannedSequence
from tests.tiny_models import tiny_hf_model

# Two layers, hidden 8, two heads of 4, feed-forward 10, vocabulary 11. Multiplications of one token in one layer:
# query 8 x 8, output 8 x 8, gated feed-forward 3 x 8 x 10; key and value 2 x 8 x 8 dense, 2 x 8 x 4 with one kv head.
LAYER = {2: 64 + 64 + 240 + 128, 1: 64 + 64 + 240 + 64}
# Scores and weighted values of one query and one key: 2 heads x 4 each. Logits of one row: 8 x 11.
PAIR, ROW = 8 + 8, 88


def _architecture(folder: Path, num_kv_heads: int) -> Architecture:
    tiny_hf_model(
        folder,
        "llama",
        tied=False,
        vocab_size=11,
        num_layers=2,
        hidden_size=8,
        ffn_size=10,
        num_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=4,
    )
    return Architecture.from_folder(folder)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_a_forward_pass_by_hand(tmp_path: Path, num_kv_heads: int) -> None:
    """Lengths 3 and 5: 8 tokens, 6 + 15 causal pairs; 4 rows of logits. Each multiplication has an addition."""
    architecture = _architecture(tmp_path, num_kv_heads)
    by_hand = 2 * (2 * (8 * LAYER[num_kv_heads] + 21 * PAIR) + 4 * ROW)
    assert forward_flops(architecture, [3, 5], 4) == by_hand
    assert forward_flops(architecture, [], 0) == 0


def test_packed_sequences_cost_the_sum_of_each_alone(tmp_path: Path) -> None:
    """A pack is no longer sequence: attention does not cross its boundaries."""
    architecture = _architecture(tmp_path, 1)
    sequences = [
        SpannedSequence(torch.arange(length), (Span(1, length),) if length > 1 else ()) for length in (1, 7, 2, 30)
    ]
    together = scoring_flops(architecture, sequences)
    assert together == sum(scoring_flops(architecture, [sequence]) for sequence in sequences)
    assert together < forward_flops(architecture, [40], 36), "as if they were one sequence"
    assert update_flops(architecture, sequences) == 3 * together


def test_decoding_runs_a_prompt_once_and_no_last_token(tmp_path: Path) -> None:
    """Prompt of 3, completions of 1 and 4: 3 + 0 + 3 tokens run, which see 1+2+3 and 4+5+6 keys; 1 + 3 rows."""
    architecture = _architecture(tmp_path, 1)
    assert decoding_flops(architecture, 3, [1, 4]) == 2 * (2 * (6 * LAYER[1] + 21 * PAIR) + 4 * ROW)


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_torch_counts_the_same_but_for_the_upper_half_of_attention(tmp_path: Path, num_kv_heads: int) -> None:
    """transformers makes all scores, masked ones too, and all rows' logits."""
    architecture, length = _architecture(tmp_path, num_kv_heads), 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    sequence = SpannedSequence(torch.arange(length), (Span(1, length),))
    with FlopCounterMode(display=False) as forward:
        logits = model(sequence.token_ids[None]).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    masked = 2 * 2 * PAIR * (length**2 - length * (length + 1) // 2)
    unwanted_row = 2 * ROW
    expected = scoring_flops(architecture, [sequence]) + masked + unwanted_row
    assert forward.get_total_flops() == expected
    assert forward.get_total_flops() + backward.get_total_flops() == 3 * expected
    assert update_flops(architecture, [sequence]) == 3 * (expected - masked - unwanted_row)
