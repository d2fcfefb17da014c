"""transformers' own answers, one sequence at a time on one process: what every layout must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.types import Span, SpannedSequence

TEMPERATURES = (1.0, 0.7)
LENGTHS = (23, 1, 9, 40, 2)


@dataclass(frozen=True)
class DenseAnswers:
    """Of one model: for each sequence its logits, and per temperature its targets' log-probs and entropies."""

    logits: tuple[Tensor, ...]  # [T, V]
    logprobs: dict[float, tuple[Tensor, ...]]  # temperature -> [N]
    entropy: dict[float, tuple[Tensor, ...]]  # temperature -> [N]


def random_sequences(vocab_size: int, *, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[SpannedSequence]:
    """Sequences with two spans of wanted tokens each, where they are long enough."""
    generator = torch.Generator().manual_seed(seed)
    return [
        SpannedSequence(torch.randint(vocab_size, (length,), generator=generator), _spans(length)) for length in lengths
    ]


def dense_answers(folder: Path, sequences: Sequence[SpannedSequence]) -> DenseAnswers:
    """Run the folder's model in fp32 on every sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = tuple(model(sequence.token_ids[None]).logits[0] for sequence in sequences)
    logprobs, entropy = {}, {}
    for temperature in TEMPERATURES:
        tables = [torch.log_softmax(values.double() / temperature, -1) for values in logits]
        wanted = [(sequence.target_positions, sequence.token_ids) for sequence in sequences]
        pairs = list(zip(tables, wanted, strict=True))
        logprobs[temperature] = tuple(table[at - 1, ids[at]].float() for table, (at, ids) in pairs)
        entropy[temperature] = tuple(-(table.exp() * table).sum(-1)[at - 1].float() for table, (at, _) in pairs)
    return DenseAnswers(logits, logprobs, entropy)


def _spans(length: int) -> tuple[Span, ...]:
    if length < 2:
        return ()
    middle = 1 + (length - 1) // 2
    return tuple(span for span in (Span(1, max(middle - 1, 1)), Span(middle, length)) if len(span))
