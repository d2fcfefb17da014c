"""An offloaded model answers as one that stays on the device, to the bit, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig, ScoringConfig
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.policy.reference import update_reference_ema
from megatron_rlt.scoring.divergence import DivergenceEngine
from megatron_rlt.scoring.engine import LogprobEngine
from megatron_rlt.types import ScoringPair, Span, SpannedSequence
from tests.models.dense import random_sequences
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

VOCAB_SIZE = 131
LAYOUTS = (LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2))
LENGTHS_BY_CALL = ((23, 9, 40), (5, 31), (12, 12, 12, 2))


def _frozen(folder: Path, layout: Layout) -> LanguageModel:
    model = loaded_model(folder, layout, torch.float32)
    model.requires_grad_(False)
    return model.eval()


def _engine(model: LanguageModel) -> LogprobEngine:
    return LogprobEngine(
        model, temperature=0.7, scoring=ScoringConfig(max_tokens_per_pack=50, row_block=16, vocab_block=64)
    )


def _device_bytes(model: LanguageModel) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _pairs() -> list[ScoringPair]:
    """Explanations of 6 and 9 tokens at different places in the teacher's and the student's sequence."""
    ids = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3))
    return [
        ScoringPair(
            problem=None,  # type: ignore[arg-type] - a divergence does not read it
            teacher=SpannedSequence(ids[:24], (Span(8, 8 + length),)),
            student=SpannedSequence(ids[5:30], (Span(3, 3 + length), Span(15, 25))),
            num_explanation_tokens=length,
            flags=frozenset(),
            explanation_text="",
        )
        for length in (6, 9)
    ]


def _compare_calls(folder: Path, other: Path) -> list[str]:
    """What differs between a model that stays on the device and an offloaded one, over calls and new weights."""
    differing = []
    for config in LAYOUTS:
        layout = build_layout(config)
        stays, offloaded, policy = _frozen(folder, layout), _frozen(folder, layout), _frozen(other, layout)
        all_bytes = _device_bytes(stays)
        offloaded.offload()
        assert all_bytes > 0
        for rounds in ("as loaded", "mixed"):
            for call, lengths in enumerate(LENGTHS_BY_CALL):
                assert _device_bytes(offloaded) == 0
                sequences = random_sequences(VOCAB_SIZE, seed=call, lengths=lengths)
                expected, found = (_engine(model).logprobs(sequences) for model in (stays, offloaded))
                if not (_same(expected.values, found.values) and _same(expected.entropy, found.entropy)):
                    differing.append(f"{config}, {rounds}, call {call}")
            expected_kl, found_kl = (
                DivergenceEngine(
                    _engine(policy), _engine(model), ScoringConfig(max_tokens_per_pack=8, row_block=4, vocab_block=32)
                ).per_token(_pairs())
                for model in (stays, offloaded)
            )
            if not _same(expected_kl, found_kl):
                differing.append(f"{config}, {rounds}, divergence")
            for model in (stays, offloaded):
                update_reference_ema(model, policy, policy_share=0.9)
        with offloaded.onloaded():
            assert _device_bytes(offloaded) == all_bytes
            with offloaded.onloaded():
                pass
            assert _device_bytes(offloaded) == all_bytes, "an inner context does not end the outer one"
            if not _same(tuple(stays.parameters()), tuple(offloaded.parameters())):
                differing.append(f"{config}, weights")
        assert _device_bytes(offloaded) == 0
    return differing


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    first, second = (
        tiny_hf_model(tmp_path_factory.mktemp("model"), "qwen2", tied=True, num_layers=2, seed=seed) for seed in (0, 1)
    )
    return first, second


def test_scores_are_bit_equal_over_calls_and_syncs_with_tp_sp_and_pp(folders: tuple[Path, Path]) -> None:
    assert run_ranks(_compare_calls, 2, *folders) == [[], []]


def _offload_a_trained_model(folder: Path) -> str:
    model = loaded_model(folder, build_layout(LayoutConfig()), torch.float32)
    with pytest.raises(AssertionError, match="a trained model stay on the device"):
        model.offload()
    return "refused"


def test_a_model_with_gradients_is_not_offloaded(folders: tuple[Path, Path]) -> None:
    assert run_ranks(_offload_a_trained_model, 1, folders[0]) == ["refused"]
