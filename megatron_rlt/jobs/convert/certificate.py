"""The certificate of a conversion: log-probs of fixed prompts by an independent fp32 reader of each side.

Transformers reads a Hugging Face folder; this program's Megatron model reads every other kind. A conversion that
permutes a fused tensor passes every comparison of hashes under its own table of names, and fails here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlt.config.folders.description import ModelDescription
from megatron_rlt.config.folders.kind import Kind
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.dense import dense_logprobs, round_weights
from megatron_rlt.models.weights.load import load_weights
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.platform import device, process_group_of_one
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Span, SpannedSequence, StoppedError, tell_nobody

NUM_PROMPTS, PROMPT_TOKENS = 8, 48
MAX_DIFFERENCE = 1e-3  # nats; two fp32 implementations agree to about 1e-5, a permuted tensor differs by more than 0.1
_SEED = 20250613


@dataclass(frozen=True)
class Comparison:
    """Log-probs of the fixed prompts on both sides."""

    readers: tuple[str, str]
    source: tuple[tuple[float, ...], ...]
    target: tuple[tuple[float, ...], ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def max_difference(self) -> float:
        """Largest difference of a token's two log-probs; NaN if any is not a number."""
        ours, theirs = torch.tensor(self.source).double(), torch.tensor(self.target).double()
        return float((ours - theirs).abs().max())

    def check(self, target: Path) -> None:
        """Raise StoppedError if the two sides are not the same model."""
        if not self.max_difference <= MAX_DIFFERENCE:  # also NaN
            raise StoppedError(
                f"{target}: not written: log-probs of the fixed prompts differ by {self.max_difference:.3g}, at most"
                f" {MAX_DIFFERENCE:g} is rounding; the source's tensors are not laid out as its metadata says"
            )


def compare(source: ModelDescription, target: ModelDescription, *, rounded_to: torch.dtype) -> Comparison:
    """Read both sides, one after the other, with weights rounded to the dtype that was written."""
    prompts = fixed_prompts(source.architecture.vocab_size)
    sides = [(_reader(side), _logprobs(side, prompts, rounded_to)) for side in (source, target)]
    return Comparison(
        (sides[0][0], sides[1][0]),
        tuple(tuple(values.tolist()) for values in sides[0][1]),
        tuple(tuple(values.tolist()) for values in sides[1][1]),
        tuple(tuple(prompt.token_ids.tolist()) for prompt in prompts),
    )


def fixed_prompts(vocab_size: int) -> tuple[SpannedSequence, ...]:
    """The same token ids for every model of a vocabulary size: no tokenizer decides what is compared."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(vocab_size, (NUM_PROMPTS, PROMPT_TOKENS), generator=generator)
    return tuple(SpannedSequence(row, (Span(1, PROMPT_TOKENS),)) for row in ids)


def _reader(described: ModelDescription) -> str:
    return "transformers" if described.found.kind is Kind.HF else "megatron-rlt"


def _logprobs(
    described: ModelDescription, prompts: tuple[SpannedSequence, ...], rounded_to: torch.dtype
) -> tuple[Tensor, ...]:
    with process_group_of_one():
        if described.found.kind is Kind.HF:
            return dense_logprobs(
                described.found.weights, prompts, temperature=1.0, on_progress=tell_nobody, rounded_to=rounded_to
            )
        layout = build_layout(LayoutConfig())
        model = build_model(described.architecture, layout, dtype=torch.float32, recompute="none").to(device())
        load_weights(model, described)
        round_weights(model, rounded_to)
        return LogprobEngine(model, temperature=1.0, scoring=ScoringConfig()).logprobs(prompts).values
