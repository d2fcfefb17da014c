"""Decoding with the cache gives the logits of a full forward pass, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.build import build_model
from megatron_rlt.models.decoding import cached_forward, decoding, last_token_logits
from megatron_rlt.models.forward import run_stage
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.packing import alignment_of, pack
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.pipeline import forward_only
from tests.models.dense import random_sequences
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TOLERANCE = 1e-5
VOCAB_SIZE = 131
LAYOUTS = {1: [LayoutConfig()], 2: [LayoutConfig(tp=2), LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2)]}
# Chunks that go through the cache: the rows kept before it (None: all), then each row's tokens. A prompt row of 5, one
# of 1 and one of 12 tokens; row 2 leaves; row 0 is repeated for a group of two; a chunk adds 3, 0 and 2 tokens.
CHUNKS: list[tuple[list[int] | None, list[list[int]]]] = [
    (None, [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]),
    (None, [[8], [4], [6]]),
    ([0, 1], [[2], [6]]),
    ([1, 0, 0], [[4], [33], [77]]),
    (None, [[38, 32, 79], [], [50, 28]]),
    (None, [[100], [130], [0]]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 (norms on queries and keys) with yarn: every detail of the cached path changes its logits."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    return tiny_hf_model(tmp_path_factory.mktemp("model"), "qwen3", tied=True, rope_scaling=scaling)


@pytest.mark.parametrize("world_size", [1, 2])
def test_cached_decoding_equals_a_full_forward_pass(world_size: int, folder: Path) -> None:
    expected = _full_forward_logits(folder)
    ranks = run_ranks(_cached_logits, world_size, folder, LAYOUTS[world_size])
    assert len(ranks[-1]) == len(LAYOUTS[world_size])
    for name, found in ranks[-1].items():
        assert len(found) == len(expected)
        errors = [
            float((torch.tensor(mine) - theirs).abs().max()) for mine, theirs in zip(found, expected, strict=True)
        ]
        assert max(errors) < TOLERANCE, f"{name}: {errors}"


def test_decoding_leaves_the_model_as_it_was(folder: Path) -> None:
    for before, after, flags in run_ranks(_outputs_around_decoding, 2, folder):
        assert before == after
        assert flags == (True, True, False, False, True, True)


def test_a_row_that_outgrows_the_cache_is_refused() -> None:
    cache = KeyValueCache(num_rows=2, max_rows=2, capacity=4, max_length=4, device=torch.device("cpu"))
    cache.begin(torch.tensor([3, 1]))
    cache.commit()
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit the cache of 4"):
        cache.begin(torch.tensor([2, 1]))


def _full_forward_logits(folder: Path) -> list[Tensor]:
    """For every chunk the logits `[B, V]` after each row's last token, from whole sequences in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows: list[list[int]] = [[] for _ in CHUNKS[0][1]]
    answers = []
    for kept, chunk in CHUNKS:
        rows = [rows[row] for row in kept] if kept is not None else rows
        rows = [row + new for row, new in zip(rows, chunk, strict=True)]
        with torch.no_grad():
            answers.append(torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows if row]))
    return answers


def _cached_logits(folder: Path, layouts: list[LayoutConfig]) -> dict[str, list[list[list[float]]]]:
    return {str(layout): _run_chunks(*_load(folder, layout)) for layout in map(build_layout, layouts)}


def _run_chunks(model: LanguageModel, cache: KeyValueCache) -> list[list[list[float]]]:
    answers, last = [], torch.zeros(len(CHUNKS[0][1]), VOCAB_SIZE)
    with decoding(model):
        for kept, chunk in CHUNKS:
            if kept is not None:
                cache.keep(torch.tensor(kept))
                last = last[torch.tensor(kept)]
            counts = torch.tensor([len(new) for new in chunk])
            padded = torch.tensor([new + [7] * (int(counts.max()) - len(new)) for new in chunk])
            hidden = cached_forward(model, cache, padded, counts)
            if hidden is not None:
                logits = last_token_logits(model, hidden, counts.clamp(min=1))
                # A row that brought no token keeps the logits it had.
                last = torch.where(counts[:, None] > 0, logits, last)
                answers.append(last.tolist())
    return answers


def _load(folder: Path, layout: Layout) -> tuple[LanguageModel, KeyValueCache]:
    architecture = Architecture.from_folder(folder)
    model = build_model(architecture, layout, dtype=torch.float32, recompute="none")
    load_hf_weights(model, folder)
    # Room for less than the chunks bring, in rows and in tokens: the cache has to reserve more, twice.
    rows = len(CHUNKS[0][1])
    return model, KeyValueCache(num_rows=rows, max_rows=2, capacity=4, max_length=32, device=torch.device("cpu"))


def _outputs_around_decoding(folder: Path) -> tuple[list[float], list[float], tuple[bool, ...]]:
    layout = build_layout(LayoutConfig(tp=2, sp=True))
    model, cache = _load(folder, layout)
    sequences = random_sequences(VOCAB_SIZE)
    batches = pack(
        sequences, range(5), max_tokens=None, max_sequences=None, alignment=alignment_of(layout, token_multiple=1)
    )

    def total() -> list[float]:
        return forward_only(
            model, layout, batches, run_stage, lambda _, output: float(output.double().sum()), on_batch=lambda _: None
        )

    before, flags = total(), (model.training, model.config.sequence_parallel)
    with decoding(model):
        flags += (model.training, model.config.sequence_parallel)
        counts = torch.tensor([1, 1, 1])
        cached_forward(model, cache, torch.tensor([[1], [2], [3]]), counts)
    return before, total(), (*flags, model.training, model.config.sequence_parallel)
