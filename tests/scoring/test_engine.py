"""Log-probs of given sequences: equal to transformers' in every layout, whatever the packing and the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import Logprobs, Span, SpannedSequence
from tests.models.dense import TEMPERATURES, DenseAnswers, dense_answers, random_sequences
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

VOCAB_SIZE = 131
LENGTHS = (23, 1, 9, 40, 2, 3, 17, 1, 31, 12)
LAYOUTS = {
    2: [LayoutConfig(), LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2), LayoutConfig(cp=2)],
    4: [
        LayoutConfig(tp=2, pp=2, sp=True),
        LayoutConfig(tp=2),
        LayoutConfig(tp=2, sp=True, cp=2),
        LayoutConfig(pp=2, cp=2),
        LayoutConfig(cp=4),
    ],
}


@dataclass(frozen=True)
class Packing:
    max_tokens: int
    shuffled: bool


PACKINGS = {
    "one by one": Packing(max_tokens=1, shuffled=False),
    "packs of 50": Packing(max_tokens=50, shuffled=False),
    "packs of 50, shuffled": Packing(max_tokens=50, shuffled=True),
    "one pack": Packing(max_tokens=1000, shuffled=True),
}


def make_sequences() -> list[SpannedSequence]:
    """Lengths 1 to 40; spans of zero, one and many tokens, some of them the sequence's last token only."""
    sequences = random_sequences(VOCAB_SIZE, seed=4, lengths=LENGTHS)
    ids = sequences[8].token_ids
    sequences[8] = SpannedSequence(ids, (Span(5, 5), Span(30, 31)))
    sequences[9] = SpannedSequence(sequences[9].token_ids, (Span(1, 2), Span(2, 2)))
    return sequences


def _order(packing: Packing) -> list[int]:
    if not packing.shuffled:
        return list(range(len(LENGTHS)))
    order: list[int] = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(9)).tolist()
    return order


def score_all(folder: Path, layouts: Sequence[LayoutConfig]) -> dict[tuple[str, float, str], Logprobs]:
    """Log-probs by layout, temperature and packing, put back into the order of `make_sequences`."""
    sequences = make_sequences()
    found = {}
    for config in layouts:
        layout = build_layout(config)
        model = loaded_model(folder, layout, torch.float32)
        for temperature in TEMPERATURES:
            for name, packing in PACKINGS.items():
                engine = _engine(model, temperature, packing.max_tokens)
                order = _order(packing)
                result = engine.logprobs([sequences[i] for i in order])
                back = [order.index(i) for i in range(len(order))]
                values, entropy = (tuple(parts[i] for i in back) for parts in (result.values, result.entropy))
                found[str(layout), temperature, name] = Logprobs(values, entropy, result.temperature)
        _check_edges(model)
    return found


def _engine(model: LanguageModel, temperature: float, max_tokens: int) -> LogprobEngine:
    return LogprobEngine(
        model,
        temperature=temperature,
        scoring=ScoringConfig(max_tokens_per_pack=max_tokens, row_block=7, vocab_block=32),
    )


def _check_edges(model: LanguageModel) -> None:
    """Fewer sequences than replicas; none at all; the model's own state; storage of the results."""
    engine = _engine(model, 1.0, 100)
    sequences = make_sequences()
    whole, alone = engine.logprobs(sequences), engine.logprobs(sequences[3:4])
    torch.testing.assert_close(alone.values[0], whole.values[3], atol=1e-6, rtol=5e-7)
    assert len(engine.logprobs([])) == 0
    assert model.training, "the policy goes on training after its old log-probs"
    assert all(parameter.grad is None for parameter in model.parameters())
    for part in (*whole.values, *engine.hidden(sequences)):
        assert part.untyped_storage().nbytes() == part.nbytes, "a view would be sent with the whole batch behind it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("scorer"), "qwen2", tied=True, num_layers=2)


@pytest.fixture(scope="module")
def dense(folder: Path) -> DenseAnswers:
    return dense_answers(folder, make_sequences())


@pytest.mark.parametrize("world_size", [2, 4])
def test_logprobs_equal_transformers_whatever_layout_packing_and_order(
    world_size: int, folder: Path, dense: DenseAnswers
) -> None:
    ranks = run_ranks(score_all, world_size, folder, LAYOUTS[world_size])
    assert len(ranks[0]) == len(LAYOUTS[world_size]) * len(TEMPERATURES) * len(PACKINGS)
    for (layout, temperature, packing), result in ranks[0].items():
        case = f"{layout}, T {temperature}, {packing}"
        assert result.temperature == temperature
        _assert_close(result.values, dense.logprobs[temperature], 1e-5, case)
        _assert_close(result.entropy, dense.entropy[temperature], 1e-5, case)
        one_by_one = ranks[0][layout, temperature, "one by one"]
        # Products of other sizes add in another order: 3.5e-6 on some processors, 1e-6 on others, for logits up to 13.
        _assert_close(result.values, one_by_one.values, 5e-6, f"{case} against one by one")
        for rank in ranks[1:]:
            _assert_close(rank[layout, temperature, packing].values, result.values, 0.0, f"{case}, ranks alike")


def _assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, case: str) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == torch.float32
        # Log-probs reach -14 here, where float32's own steps are 1e-6.
        torch.testing.assert_close(
            a, b, atol=tolerance, rtol=tolerance, msg=lambda m, i=index: f"{case}, sequence {i}: {m}"
        )


def _hidden_and_weight(folder: Path) -> tuple[tuple[Tensor, ...], Tensor | None]:
    layout = build_layout(LayoutConfig(tp=1, pp=2))
    model = loaded_model(folder, layout, torch.float32)
    hidden = _engine(model, 0.7, 50).hidden(make_sequences())
    return hidden, model.output_weight().detach().clone() if layout.is_last_stage else None


def test_hidden_states_give_the_dense_logits_of_the_wanted_rows(folder: Path, dense: DenseAnswers) -> None:
    (first, _), (second, weight) = run_ranks(_hidden_and_weight, 2, folder)
    for sequence, on_first, on_second, logits in zip(make_sequences(), first, second, dense.logits, strict=True):
        assert torch.equal(on_first, on_second)
        torch.testing.assert_close(on_first @ weight.T, logits[sequence.target_positions - 1], atol=2e-5, rtol=0)
