"""Megatron's logits and log-probs equal transformers' in every layout, packed and one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.forward import run_stage, target_logprobs, target_rows
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, pack
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.parallel.packed_batch import PackedBatch
from megatron_rlt.parallel.pipeline import forward_only
from megatron_rlt.types import SpannedSequence
from tests.models.dense import TEMPERATURES, DenseAnswers, dense_answers, random_sequences
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TOLERANCE = 2e-5
VOCAB_SIZE = 131
LAYOUTS = {
    1: [LayoutConfig()],
    2: [LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2)],
    4: [LayoutConfig(tp=2, pp=2, sp=True)],
}
ROPE_SCALINGS = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family tied and untied, their dense answers beside them."""
    root = tmp_path_factory.mktemp("models")
    sequences = random_sequences(VOCAB_SIZE)
    folders = {}
    for seed, (family, tied) in enumerate((f, t) for f in ("llama", "qwen2", "qwen3") for t in (False, True)):
        name = f"{family}-{'tied' if tied else 'untied'}"
        folders[name] = tiny_hf_model(root / name, family, tied=tied, seed=seed, vocab_size=VOCAB_SIZE)
        torch.save(dense_answers(folders[name], sequences), folders[name] / "answers.pt")
    return folders


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logits_and_logprobs_equal_transformers_in_every_layout(world_size: int, models: dict[str, Path]) -> None:
    # Arrange: 6 models, 5 sequences of 1 to 40 tokens, 2 temperatures, packs of all, of at most 30 tokens, of one.
    errors = run_ranks(_largest_errors, world_size, models, LAYOUTS[world_size])
    merged = {case: max(rank.get(case, 0.0) for rank in errors) for case in errors[-1]}
    assert len(merged) == len(LAYOUTS[world_size]) * len(models) * 3
    assert {case: error for case, error in merged.items() if not error < TOLERANCE} == {}


def test_scaled_rope_equals_transformers(tmp_path: Path) -> None:
    sequences = random_sequences(VOCAB_SIZE)
    folders, answers = {}, {}
    for name, scaling in ROPE_SCALINGS.items():
        folders[name] = tiny_hf_model(tmp_path / name, "llama", tied=False, rope_scaling=scaling)
        answers[name] = dense_answers(folders[name], sequences)
        torch.save(answers[name], folders[name] / "answers.pt")
    errors = run_ranks(_largest_errors, 1, folders, [LayoutConfig()])[0]
    assert {case: error for case, error in errors.items() if not error < TOLERANCE} == {}
    # The scalings change the answers by far more than the tolerance: agreement is not for lack of effect.
    plain = dense_answers(tiny_hf_model(tmp_path / "plain", "llama", tied=False), sequences)
    for name in ROPE_SCALINGS:
        assert (answers[name].logits[3] - plain.logits[3]).abs().max() > 1e-2


def _largest_errors(folders: dict[str, Path], layouts: list[LayoutConfig]) -> dict[str, float]:
    """On a rank of the last stage: largest difference to the dense answers of every layout, model and packing."""
    errors = {}
    for config in layouts:
        layout = build_layout(config)
        for name, folder in folders.items():
            architecture = Architecture.from_folder(folder)
            model = build_model(architecture, layout, dtype=torch.float32, recompute="none").eval()
            load_hf_weights(model, folder)
            dense = torch.load(folder / "answers.pt", weights_only=False)
            for packing, (max_tokens, max_sequences) in {
                "one pack": (None, None),
                "packs of 30": (30, None),
                "one by one": (None, 1),
            }.items():
                sequences = random_sequences(VOCAB_SIZE)
                batches = pack(
                    sequences,
                    range(len(sequences)),
                    max_tokens=max_tokens,
                    max_sequences=max_sequences,
                    alignment=alignment_of(layout, token_multiple=1),
                )
                compare = partial(_error_of_batch, model, dense, sequences, batches)
                found = forward_only(model, layout, batches, run_stage, compare, on_batch=lambda _: None)
                errors[f"{layout}, {name}, {packing}"] = max(found, default=0.0)
    return errors


def _error_of_batch(
    model: LanguageModel,
    dense: DenseAnswers,
    sequences: list[SpannedSequence],
    batches: list[PackedBatch],
    number: int,
    output: Tensor,
) -> float:
    batch = batches[number]
    errors = []
    logits = _whole_logits(model, output, batch)
    for index, values in zip(batch.sequence_indices, torch.split(logits, batch.lengths), strict=False):
        errors.append((values - dense.logits[index]).flatten())
    for temperature in TEMPERATURES:
        logprobs, entropy = target_logprobs(model, output, batch, temperature=temperature, row_block=7, vocab_block=32)
        errors.append(logprobs - batch.join(dense.logprobs[temperature]))
        errors.append(entropy - batch.join(dense.entropy[temperature]))
    return float(torch.cat(errors).abs().max())


def _whole_logits(model: LanguageModel, output: Tensor, batch: PackedBatch) -> Tensor:
    hidden = target_rows(output, torch.arange(batch.input_ids.numel()), model.layout)
    logits: Tensor = gather_from_tensor_model_parallel_region(
        hidden @ model.output_weight().T, group=model.layout.tp_group
    )
    return logits[:, :VOCAB_SIZE]
