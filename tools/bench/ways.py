"""What the benches let compete: two ways to score through transformers, and this project's scoring and update passes.

Each function loads a model folder in the process that calls it and returns the way ready to run (`contest.Prepared`).
All return the log-probs of the wanted tokens at one temperature, so that they can be seen to agree.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.policy.policy import Policy
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import SpannedSequence
from tools.bench.contest import Prepared
from tools.bench.machine import held_bytes

TEMPERATURE = 0.7


def one_at_a_time(folder: Path, dtype: str) -> Prepared:
    """The public reference's way: one sequence through transformers, divide all logits, log-softmax, gather."""
    model = _transformers_model(folder, dtype)

    @torch.no_grad()
    def work(sequences: list[SpannedSequence]) -> Tensor:
        parts = []
        for one in sequences:
            logprobs = (model(one.token_ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            parts.append(logprobs.gather(1, one.token_ids[1:, None])[one.target_positions - 1, 0].float())
        return torch.cat(parts)

    return Prepared(work, held_bytes(), Architecture.from_folder(folder).vocab_size)


def padded_batches(folder: Path, dtype: str, *, batch_size: int) -> Prepared:
    """Sequences as they come, padded on the right to the longest of their batch.

    The logits are divided in place and the log-sum-exp taken one row at a time, as TRL does: all at once, a batch of
    four sequences of 2,000 tokens at 152k would hold 15 GB.
    """
    model = _transformers_model(folder, dtype)

    @torch.no_grad()
    def work(sequences: list[SpannedSequence]) -> Tensor:
        parts = []
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            ids = nn.utils.rnn.pad_sequence([one.token_ids for one in batch], batch_first=True)
            lengths = torch.tensor([len(one) for one in batch])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = model(ids, attention_mask=mask).logits.div_(TEMPERATURE)
            for one, row_logits in zip(batch, logits, strict=True):
                predicted = row_logits[: len(one) - 1]
                logprobs = predicted.gather(1, one.token_ids[1:, None])[:, 0] - predicted.logsumexp(-1)
                parts.append(logprobs[one.target_positions - 1].float())
        return torch.cat(parts)

    return Prepared(work, held_bytes(), Architecture.from_folder(folder).vocab_size)


def scoring(folder: Path, dtype: str, *, layout: LayoutConfig, settings: ScoringConfig) -> Prepared:
    """This project's scoring pass, in one layout."""
    model = _megatron_model(folder, dtype, layout)
    held = held_bytes()
    engine = LogprobEngine(model, temperature=TEMPERATURE, scoring=settings)
    return Prepared(lambda sequences: torch.cat(engine.logprobs(sequences).values), held, model.unpadded_vocab_size)


def update(
    folder: Path, dtype: str, *, layout: LayoutConfig, settings: ScoringConfig, micro_batch_size: int
) -> Prepared:
    """This project's forward and backward passes and optimizer step; gradients and optimizer count as extra memory."""
    model = _megatron_model(folder, dtype, layout)
    held = held_bytes()
    policy = Policy(
        model,
        optimizer=OptimizerConfig(lr=1e-12),  # so small that every round sees the same weights
        blocks=settings,
        temperature=TEMPERATURE,
        max_tokens_per_pack=16384,
        micro_batch_size=micro_batch_size,
        num_updates=1000,
    )

    def work(sequences: list[SpannedSequence]) -> Tensor:
        num_rows = sum(one.num_targets for one in sequences)

        def loss(batch: PackedBatch, logprobs: Tensor, _: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
            parts = batch.split(logprobs.detach().clone())
            return -logprobs.sum() / num_rows, dict(zip(batch.sequence_indices, parts, strict=True))

        parts = {index: part for record in policy.update(sequences, loss).records for index, part in record.items()}
        return torch.cat([parts[index] for index in range(len(sequences))])

    return Prepared(work, held, model.unpadded_vocab_size)


def _megatron_model(folder: Path, dtype: str, layout: LayoutConfig) -> LanguageModel:
    architecture = Architecture.from_folder(folder)
    model = build_model(architecture, build_layout(layout), dtype=getattr(torch, dtype), recompute="none")
    load_hf_weights(model, folder)
    return model


def _transformers_model(folder: Path, dtype: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    for parameter in model.parameters():  # files are mapped lazily: copy them into memory, or use would count as extra
        parameter.data = parameter.data.clone()
    return model
