"""Two GRPO updates in every layout against a dense single-process model with torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.algorithm.policy_loss import LossSums, policy_loss
from megatron_rlt.algorithm.token_weights import token_weights
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.training import OptimizerConfig
from megatron_rlt.jobs.run.load_models import load_model
from megatron_rlt.models.weights.export import Destination, export_tensors
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.policy.policy import Policy
from megatron_rlt.types import Span, SpannedSequence, StoppedError
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TEMPERATURE = 0.7
CLIP_LOW, CLIP_HIGH, BETA = 0.2, 0.28, 0.04
ADAM = OptimizerConfig(lr=1e-3, beta2=0.95, epsilon=1e-6, weight_decay=0.1, clip_grad=1.0)
Updates = tuple[list[float], list[float], dict[str, Tensor]]  # losses, gradient norms, final weights
# Where a gradient is below Adam's epsilon, its rounding moves the weight: these few weights are not compared.
Reliable = dict[str, Tensor]
MOST_UNRELIABLE = 0.05  # share of the model's weights; most belong to output rows of improbable tokens
INVALID = 3  # a completion without a reward: it must not count anywhere


@dataclass(frozen=True)
class Batch:
    """Six completions with fixed old and reference log-probs, so that clipping and KL both act."""

    sequences: tuple[SpannedSequence, ...]
    old: tuple[Tensor, ...]
    reference: tuple[Tensor, ...]
    advantages: Tensor
    valid: tuple[bool, ...]
    importance: tuple[Tensor, ...]  # for the corrected cases: of the policy's part of the loss
    kept: tuple[Tensor, ...]  # for the corrected cases: False where a token takes no part


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    lengths = (12, 7, 20, 9, 15, 2)  # the last has a one-token completion
    sequences = tuple(
        SpannedSequence(torch.randint(0, 131, (length,), generator=generator), (Span(length - length // 2, length),))
        for length in lengths
    )
    # Near the tiny models' own log-probs (about -5) so that some ratios lie inside the clip range and some outside.
    noise = [torch.randn(sequence.num_targets, generator=generator) for sequence in sequences]
    return Batch(
        sequences,
        old=tuple(-5 + values for values in noise),
        reference=tuple(-5 - values for values in noise),
        advantages=torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        valid=tuple(index != INVALID for index in range(len(lengths))),
        importance=tuple((values / 2).exp().clamp(max=2.0) for values in noise),
        kept=tuple(values > -1.0 for values in noise),
    )


def dense_updates(folder: Path, aggregation: str, corrected: bool) -> tuple[Updates, Reliable]:
    """Losses, gradient norms and final weights of two updates, written out without any of our code."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # Megatron exempts norms and biases from decay
    groups = [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.epsilon)
    batch = make_batch()
    used = [index for index in range(len(batch.sequences)) if index != INVALID]
    losses, norms = [], []
    reliable = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        terms = [dense_token_losses(model, batch, index, corrected) for index in used]
        loss = torch.cat(terms).mean() if aggregation == "token_mean" else sum(t.mean() for t in terms) / len(terms)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)))
        losses.append(float(loss))
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            # A gradient of exactly 0, as of a token that no sequence holds, has no rounding.
            reliable[name] &= (parameter.grad.abs() >= ADAM.epsilon) | (parameter.grad == 0)
        optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return (losses, norms, weights), reliable


def dense_token_losses(model: torch.nn.Module, batch: Batch, index: int, corrected: bool) -> Tensor:
    sequence, (span,) = batch.sequences[index], batch.sequences[index].spans
    logprobs = (model(sequence.token_ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    new = logprobs.gather(1, sequence.token_ids[1:, None])[span.start - 1 : span.stop - 1, 0]
    ratio = (new - batch.old[index]).exp()
    advantage = batch.advantages[index].float()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    gap = batch.reference[index] - new
    divergence = gap.exp() - 1 - gap
    if corrected:
        return batch.kept[index] * (-batch.importance[index] * surrogate + BETA * divergence)
    return -surrogate + BETA * divergence


def megatron_updates(
    folder: Path, layout_config: LayoutConfig, limit: PackLimit, aggregation: str, corrected: bool
) -> Updates:
    layout = build_layout(layout_config)
    model = load_model(ModelConfig(model=folder, dtype="float32", layout=layout_config), layout)
    policy = Policy(
        model,
        optimizer=ADAM,
        blocks=ScoringConfig(row_block=7, vocab_block=32),
        temperature=TEMPERATURE,
        max_tokens_per_pack=limit[0],
        micro_batch_size=limit[1],
        num_updates=2,
    )
    batch = make_batch()
    lengths = [sequence.num_targets for sequence in batch.sequences]
    weights = token_weights(lengths, batch.valid, aggregation=aggregation)  # type: ignore[arg-type]

    def loss(packed: PackedBatch, logprobs: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        def rows(values: Tensor) -> Tensor:
            return packed.join([value.expand(length) for value, length in zip(values, lengths, strict=True)])

        masked = rows(weights)
        if corrected:
            masked = masked * packed.join(batch.kept)

        scalar, sums = policy_loss(
            logprobs,
            old_logprobs=packed.join(batch.old),
            reference_logprobs=packed.join(batch.reference),
            advantages=rows(batch.advantages),
            weights=masked,
            importance=packed.join(batch.importance) if corrected else None,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            beta=BETA,
        )
        return scalar, sums.to_vector()

    losses, norms = [], []
    for _ in range(2):
        update = policy.update(batch.sequences, loss)
        losses.append(float(LossSums.total(map(LossSums.from_vector, update.records), torch.device("cpu")).loss))
        norms.append(update.grad_norm)
    exported = export_tensors(model, destination=Destination.RANK_ZERO)
    return losses, norms, dict(exported)


PackLimit = tuple[int, int | None]  # tokens and completions per pass
ONE, FOUR, TOKENS = (1000, 1), (1000, 4), (30, None)  # the sequences have 12, 7, 20, 9, 15 and 2 tokens
CASES: dict[int, list[tuple[LayoutConfig, PackLimit]]] = {
    1: [(LayoutConfig(), ONE), (LayoutConfig(), FOUR)],
    2: [
        (LayoutConfig(tp=2), TOKENS),
        (LayoutConfig(tp=2, sp=True), ONE),
        (LayoutConfig(tp=2, sp=True), FOUR),
        (LayoutConfig(pp=2), ONE),
        (LayoutConfig(pp=2), TOKENS),
        (LayoutConfig(), ONE),
        (LayoutConfig(), FOUR),
        (LayoutConfig(cp=2), ONE),
        (LayoutConfig(cp=2), TOKENS),
    ],
    4: [
        (LayoutConfig(tp=2, pp=2, sp=True), FOUR),
        (LayoutConfig(tp=2), ONE),
        (LayoutConfig(pp=2), TOKENS),
        (LayoutConfig(), FOUR),
        (LayoutConfig(tp=2, sp=True, cp=2), TOKENS),
        (LayoutConfig(pp=2, cp=2), ONE),
        (LayoutConfig(cp=2), FOUR),
    ],
}


def run_cases(
    folder: Path, world_size: int, aggregation: str, corrected: bool
) -> list[tuple[list[float], list[float], dict[str, Tensor]]]:
    return [megatron_updates(folder, layout, limit, aggregation, corrected) for layout, limit in CASES[world_size]]


@pytest.mark.parametrize(
    ("family", "tied", "aggregation", "corrected"),
    [("qwen2", True, "sequence_mean", False), ("qwen3", False, "token_mean", True)],
)
def test_two_updates_equal_a_dense_model_in_every_layout(
    tmp_path: Path, family: str, tied: bool, aggregation: str, corrected: bool
) -> None:
    folder = tiny_hf_model(tmp_path / "model", family, tied=tied)
    (expected_losses, expected_norms, expected_weights), reliable = dense_updates(folder, aggregation, corrected)
    assert float((~torch.cat([kept.flatten() for kept in reliable.values()])).double().mean()) <= MOST_UNRELIABLE
    for world_size, cases in CASES.items():
        results = run_ranks(run_cases, world_size, folder, world_size, aggregation, corrected)[0]
        for case, (losses, norms, weights) in zip(cases, results, strict=True):
            # The second loss and norm follow an Adam step, which makes rounding of the first gradient visible.
            assert losses[0] == pytest.approx(expected_losses[0], rel=1e-5), case
            assert losses[1] == pytest.approx(expected_losses[1], rel=2e-5), case
            assert norms == pytest.approx(expected_norms, rel=5e-5), case
            for name, value in weights.items():
                kept = reliable.get(name, torch.ones_like(value, dtype=torch.bool))
                off = (value - expected_weights[name]).abs()
                assert float(off[kept].max()) <= 1e-5, f"{case} {name}"
                assert float(off.max()) <= 2 * ADAM.lr, f"{case} {name}"


def nonfinite_gradients(folder: Path) -> tuple[list[bool], bool, str]:
    layout = build_layout(LayoutConfig(tp=2))
    model = load_model(ModelConfig(model=folder, dtype="float32", layout=LayoutConfig(tp=2)), layout)
    policy = Policy(
        model,
        optimizer=ADAM.model_copy(update={"max_skipped_steps": 3}),
        blocks=ScoringConfig(),
        temperature=1.0,
        max_tokens_per_pack=1000,
        micro_batch_size=2,
        num_updates=9,
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    sequences = make_batch().sequences

    def loss(_: PackedBatch, logprobs: Tensor, __: Tensor) -> tuple[Tensor, None]:
        return logprobs.sum() * float("nan"), None

    skipped = [policy.update(sequences, loss).skipped for _ in range(2)]
    unchanged = all(torch.equal(before[name], value) for name, value in model.named_parameters())
    with pytest.raises(RuntimeError, match="3 updates in a row") as error:
        policy.update(sequences, loss)
    return skipped, unchanged, str(error.value)


def test_a_nonfinite_gradient_skips_the_update_and_in_a_row_stops_the_run(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path / "model", "llama", tied=False)
    for skipped, unchanged, message in run_ranks(nonfinite_gradients, 2, folder):
        assert skipped == [True, True]
        assert unchanged
        assert "optimizer.lr" in message


def updates_without_completions(folder: Path) -> tuple[list[bool], bool, str]:
    layout = build_layout(LayoutConfig())
    model = load_model(ModelConfig(model=folder, dtype="float32"), layout)
    policy = Policy(
        model,
        optimizer=ADAM.model_copy(update={"max_skipped_steps": 3}),
        blocks=ScoringConfig(),
        temperature=1.0,
        max_tokens_per_pack=1000,
        micro_batch_size=2,
        num_updates=9,
    )
    sequences = make_batch().sequences

    def loss(_: PackedBatch, logprobs: Tensor, __: Tensor) -> tuple[Tensor, None]:
        return logprobs.sum(), None

    def nothing(_: PackedBatch, logprobs: Tensor, __: Tensor) -> tuple[Tensor, None]:
        return logprobs.sum() * 0, None

    policy.update(sequences, loss)  # fills Adam's moments, which would move the weights
    before = {name: value.clone() for name, value in model.named_parameters()}
    skipped = [policy.update(sequences, nothing, nothing_counts=True).skipped for _ in range(2)]
    unchanged = all(torch.equal(before[name], value) for name, value in model.named_parameters())
    skipped.append(policy.update(sequences, loss).skipped)  # begins the count anew
    skipped += [policy.update(sequences, nothing, nothing_counts=True).skipped for _ in range(2)]
    with pytest.raises(StoppedError) as error:
        policy.update(sequences, nothing, nothing_counts=True)
    return skipped, unchanged, str(error.value)


def test_updates_without_any_completion_change_nothing_and_in_a_row_stop_the_run(tmp_path: Path) -> None:
    folder = tiny_hf_model(tmp_path / "model", "llama", tied=False)
    ((skipped, unchanged, message),) = run_ranks(updates_without_completions, 1, folder)
    assert skipped == [True, True, False, True, True]
    assert unchanged
    assert "3 updates in a row changed nothing (optimizer.max_skipped_steps=3)" in message
    assert "no completion was in the loss" in message
