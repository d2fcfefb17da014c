"""Scores of emulated FP8 models: what they depend on, and how far they are from bfloat16's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.build import build_model
from megatron_rlt.models.weights.load import load_hf_weights
from megatron_rlt.parallel.layout import build_layout
from megatron_rlt.scoring.engine import LogprobEngine
from tests.fp8_scores import SECTIONS, score, sequences, small_model
from tests.ranks import run_ranks

BLOCKWISE, MXFP8, TENSORWISE = Fp8Config(), Fp8Config(recipe="mxfp8"), Fp8Config(recipe="tensorwise")
LAYOUTS = (
    LayoutConfig(tp=2),
    LayoutConfig(tp=2, sp=True),
    LayoutConfig(pp=2),
    LayoutConfig(cp=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("fp8") / "model")


def _pack_mates(folder: Path) -> dict[str, list[bool]]:
    """For each recipe, whether the first sequence's score is as it is alone, with mates before it and after it."""
    first, *mates = sequences()
    found = {}
    for fp8 in (BLOCKWISE, Fp8Config(scales="power_of_two"), MXFP8, TENSORWISE, Fp8Config(activations=False)):
        packs = ([first], [*mates, first], [first, mates[0]])
        alone, *others = (score(folder, fp8, pack)[pack.index(first)] for pack in packs)
        found[f"{fp8.recipe} {fp8.scales} {fp8.activations}"] = [torch.equal(alone, other) for other in others]
    return found


def test_a_score_does_not_depend_on_the_pack_except_tensorwise(folder: Path) -> None:
    (found,) = run_ranks(_pack_mates, 1, folder)
    assert found == {
        "blockwise float32 True": [True, True],
        "blockwise power_of_two True": [True, True],
        "mxfp8 float32 True": [True, True],
        "tensorwise float32 True": [False, False],
        "blockwise float32 False": [True, True],
    }


def _float32_scores(folder: Path, layouts: tuple[LayoutConfig, ...], recipes: tuple[Fp8Config, ...]) -> list[Tensor]:
    """With float32 around the FP8 linears, which no configuration allows: what is left is the order of sums."""
    scores = []
    for config in layouts:
        layout = build_layout(config)
        for fp8 in recipes:
            architecture = Architecture.from_folder(folder)
            model = build_model(architecture, layout, dtype=torch.float32, recompute="none", fp8=fp8)
            load_hf_weights(model, folder)
            model.requires_grad_(False)
            scoring = ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=64)
            scores.append(
                torch.cat(LogprobEngine(model, temperature=0.7, scoring=scoring).logprobs(sequences()).values)
            )
    return scores


def test_layouts_do_not_change_a_score_of_blocks(folder: Path) -> None:
    """Another order of sums moves a value by 1e-7, which now and then turns a code: most tokens are equal to 1e-5."""
    recipes = (BLOCKWISE, MXFP8, TENSORWISE)
    (alone,) = run_ranks(_float32_scores, 1, folder, (LayoutConfig(),), recipes)
    for rank in run_ranks(_float32_scores, 2, folder, LAYOUTS, recipes):
        for number, config in enumerate(LAYOUTS):
            gaps = [(rank[number * len(recipes) + place] - one).abs().median() for place, one in enumerate(alone)]
            assert max(gaps[:2]) < 1e-4, f"{config}: {gaps}"
            assert config.pp == 2 or gaps[2] > 0.1, f"{config}: tensorwise scales depend on the split"


def _sections(folder: Path) -> dict[str, Tensor]:
    return {name: torch.cat(score(folder, fp8, sequences())) for name, fp8 in SECTIONS.items()}


def test_fp8_is_on_and_its_error_is_that_of_3_mantissa_bits(folder: Path) -> None:
    (scores,) = run_ranks(_sections, 1, folder)
    errors = {name: (scores[name] - scores["bf16"]).abs().mean().item() for name in SECTIONS}
    assert 0.1 < errors["blockwise"] < 1.0
    assert 0.1 < errors["tensorwise"] < 1.0
    assert 0.05 < errors["storage"] < errors["blockwise"], "inputs are not rounded"
    assert errors["fc2 and ends bf16"] == 0, "of two layers both are at an end"


def _offloaded(folder: Path) -> list[str]:
    layout, wrong = build_layout(LayoutConfig(tp=2, sp=True)), []
    for fp8 in (BLOCKWISE, MXFP8):
        section = ModelConfig(model=folder, fp8=fp8, layout=LayoutConfig(tp=2, sp=True))
        stays = load_frozen_model(section, layout)
        offloaded = load_frozen_model(section.model_copy(update={"offload": True}), layout)
        expected, found = (
            LogprobEngine(model, temperature=0.7, scoring=ScoringConfig()).logprobs(sequences()).values
            for model in (stays, offloaded)
        )
        left = sum(one.untyped_storage().nbytes() for one in (*offloaded.parameters(), *offloaded.buffers()))
        if left or offloaded.weight_bytes or offloaded.host_weight_bytes != stays.weight_bytes:
            wrong.append(f"{fp8.recipe}: {left} bytes are left")
        if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
            wrong.append(f"{fp8.recipe}: other scores")
    return wrong


def test_an_offloaded_model_leaves_nothing_and_scores_alike(folder: Path) -> None:
    assert run_ranks(_offloaded, 2, folder) == [[], []]
