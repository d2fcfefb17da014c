"""One token through the layers without Megatron's modules: the modules' own results, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models.decoding import decoding, run_chunk
from megatron_rlt.models.kv_cache import KeyValueCache
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.one_token import run_one_token
from megatron_rlt.parallel.layout import build_layout
from tests.models.loading import loaded_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

NUM_STEPS = 3
PROMPT = torch.arange(1, 13).view(2, 6)  # a row of six tokens and one of four
COUNTS = torch.tensor([6, 4])
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {1: [LayoutConfig()], 2: [LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2)]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Biased queries; norms on queries and keys; scaled rotations: each family's own turn is in one of them."""
    root = tmp_path_factory.mktemp("models")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    return [
        tiny_hf_model(root / "qwen2", "qwen2", tied=True),
        tiny_hf_model(root / "qwen3", "qwen3", tied=False, rope_scaling=yarn),
        tiny_hf_model(root / "llama", "llama", tied=False),
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_token_gives_the_modules_own_bits(world_size: int, folders: list[Path]) -> None:
    for pairs in run_ranks(_run_both_ways, world_size, folders, LAYOUTS[world_size]):
        assert len(pairs) == len(folders) * len(DTYPES) * len(LAYOUTS[world_size]) * NUM_STEPS
        for name, by_modules, by_hand in pairs:
            assert torch.tensor(by_modules).abs().sum() > 0
            assert by_hand == by_modules, name


def _run_both_ways(
    folders: list[Path], layouts: list[LayoutConfig]
) -> list[tuple[str, list[list[float]], list[list[float]]]]:
    """Every stage by itself, fed with the same numbers both ways."""
    pairs = []
    for folder in folders:
        for layout in map(build_layout, layouts):
            for dtype in DTYPES:
                model = loaded_model(folder, layout, dtype)
                with decoding(model):
                    caches = [_prefilled(model), _prefilled(model)]
                    for step in range(NUM_STEPS):
                        ids, received = torch.tensor([[step], [50 + step]]), _received(model, 1, step)
                        for cache in caches:
                            cache.begin(torch.tensor([1, 1]))
                        by_modules = run_chunk(model, ids, received, caches[0])
                        by_hand = run_one_token(model, ids, received, caches[1])
                        for cache in caches:
                            cache.commit()
                        name = f"{folder.name}, {layout}, {dtype}, step {step}"
                        pairs.append((name, by_modules[0].tolist(), by_hand[0].tolist()))
    return pairs


def _prefilled(model: LanguageModel) -> KeyValueCache:
    cache = KeyValueCache(num_rows=2, max_rows=2, capacity=8, max_length=16, device=torch.device("cpu"))
    cache.begin(COUNTS)
    run_chunk(model, PROMPT, _received(model, PROMPT.size(1), 99), cache)
    cache.commit()
    return cache


def _received(model: LanguageModel, width: int, seed: int) -> Tensor | None:
    """What a stage before this one might have sent: `[S, 2, H]`."""
    if model.layout.is_first_stage:
        return None
    generator = torch.Generator().manual_seed(seed)
    shape = (width, 2, model.config.hidden_size)
    return torch.randn(shape, generator=generator).to(model.config.params_dtype)
