"""On one GPU: Transformer Engine's FP8 against the plain-torch emulation, bfloat16, and what the plan says.

Measured figures are printed; `-s` shows them, `--junitxml` keeps them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig, ScoringConfig
from megatron_rlt.config.plan import model_plan
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.build import build_model
from megatron_rlt.models.fp8 import plain_parts, quantised_parameters
from megatron_rlt.models.quantise import dequantise, input_block, quantise, weight_block
from megatron_rlt.models.spec import uses_transformer_engine
from megatron_rlt.parallel.environment import Place, torch_environment
from megatron_rlt.parallel.layout import Layout, build_layout
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from megatron_rlt.scoring.engine import LogprobEngine
from tests.fp8_scores import SECTIONS, VOCAB_SIZE, emulated_scores, sequences, small_model
from tests.models.dense import random_sequences
from tests.models.loading import folder_tensors

pytestmark = pytest.mark.gpu
Report = Callable[[str, object], None]
RECIPES = ("blockwise", "tensorwise")  # Hopper's
BILLION = Architecture(  # the shape of a model of about 1 billion parameters
    family="llama",
    num_layers=16,
    hidden_size=2048,
    ffn_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32000,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=4096,
)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    assert uses_transformer_engine(torch.bfloat16), "install Transformer Engine, or these tests prove nothing"
    with torch_environment(Place(0, 1, 0, "this test")):
        start_distributed(timeout_seconds=120)
        yield build_layout(LayoutConfig())
        stop_distributed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("fp8") / "model", num_layers=3)


@pytest.fixture
def report(record_property: Report) -> Report:
    def both(name: str, value: object) -> None:
        record_property(name, value)
        print(f"{name}: {value}")

    return both


def _engine(folder: Path, layout: Layout, fp8: Fp8Config | None, *, offload: bool = False) -> LogprobEngine:
    model = load_frozen_model(ModelConfig(model=folder, fp8=fp8, offload=offload), layout)
    scoring = ScoringConfig(max_tokens_per_pack=512, row_block=64, vocab_block=64)
    return LogprobEngine(model, temperature=0.7, scoring=scoring)


@pytest.mark.parametrize("recipe", RECIPES)
def test_loaded_weights_equal_the_plain_rules(folder: Path, layout: Layout, recipe: str) -> None:
    fp8 = Fp8Config(recipe=recipe)  # type: ignore[arg-type]
    model, stored = _engine(folder, layout, fp8).model, folder_tensors(folder)
    parameters = dict(quantised_parameters(model))
    assert len(parameters) == 3 * 4
    for layer in range(3):
        for ours, theirs in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
            values = stored[f"model.layers.{layer}.{theirs}.weight"].cuda()
            codes, factors = quantise(values, weight_block(fp8), power_of_two=False)
            held = parameters[f"decoder.layers.{layer}.{ours}.weight"]
            expected = dequantise(codes, factors, weight_block(fp8))
            # A factor may differ in its last bit; a code that differed would be off by 3 % at least.
            found = held.dequantize(dtype=torch.float32)  # type: ignore[attr-defined]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_weights_are_stored_once_and_bias_and_norms_are_not_quantised(folder: Path, layout: Layout) -> None:
    model = _engine(folder, layout, Fp8Config()).model
    quantised = dict(quantised_parameters(model))
    assert all(".linear_" in name and name.endswith(".weight") for name in quantised)
    for name, parameter in quantised.items():
        dtypes = [part.dtype for part in plain_parts(parameter)]
        assert dtypes == [torch.uint8, torch.float32], f"{name}: {dtypes}"
    others = {parameter.dtype for name, parameter in model.named_parameters() if name not in quantised}
    assert others == {torch.bfloat16}


def test_what_stays_bf16_is_not_quantised(folder: Path, layout: Layout) -> None:
    model = _engine(folder, layout, SECTIONS["fc2 and ends bf16"]).model
    assert sorted(dict(quantised_parameters(model))) == [
        f"decoder.layers.1.{name}.weight"
        for name in ("mlp.linear_fc1", "self_attention.linear_proj", "self_attention.linear_qkv")
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_what_the_plan_says(layout: Layout, report: Report, recipe: str) -> None:
    allocated = {}
    for name, fp8 in (("bf16", None), (recipe, Fp8Config(recipe=recipe))):  # type: ignore[arg-type]
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = build_model(BILLION, layout, dtype=torch.bfloat16, recompute="none", fp8=fp8)
        torch.cuda.synchronize()
        allocated[name] = torch.cuda.memory_allocated() - before
        planned = model_plan("m", ModelConfig(model=Path("m"), fp8=fp8), BILLION, 1, use="frozen").weight_bytes
        assert model.weight_bytes == pytest.approx(planned, rel=0.01)
        assert allocated[name] == pytest.approx(planned, rel=0.02)
        del model
    report(f"memory_share_{recipe}", allocated[recipe] / allocated["bf16"])
    assert allocated[recipe] <= 0.60 * allocated["bf16"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["self_attention.linear_proj", "mlp.linear_fc2"])
def test_a_linear_layer_equals_the_emulation(
    folder: Path, layout: Layout, report: Report, recipe: str, name: str
) -> None:
    """The same rounding of both operands: what is left is accumulation and the result's bfloat16."""
    fp8 = Fp8Config(recipe=recipe)  # type: ignore[arg-type]
    model = _engine(folder, layout, fp8).model
    linear = model.decoder.layers[0].get_submodule(name)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(256, 1, linear.weight.size(1), generator=generator, device="cuda", dtype=torch.bfloat16)
    with layout, torch.no_grad(), get_fp8_context(model.config, 0):
        found = linear(hidden)[0][:, 0].float()
    weight, block = linear.weight.dequantize(dtype=torch.float32), input_block(fp8)
    codes, factors = quantise(hidden[:, 0], block, power_of_two=False)
    expected, unquantised = dequantise(codes, factors, block) @ weight.T, hidden[:, 0].float() @ weight.T
    gap, error = _relative_rms(found, expected), _relative_rms(unquantised, expected)
    report(f"linear_gap_and_input_rounding_{recipe}_{name}", (gap, error))
    assert error > 0.015, "rounding the input to FP8 is visible"
    assert gap < 0.25 * error


def test_scores_follow_the_emulation(tmp_path: Path, folder: Path, layout: Layout, report: Report) -> None:
    """Where FP8 rounds inputs, the last bit of a bfloat16 decides some codes, so that errors agree in part only; where
    it rounds weights alone, the errors are the same."""
    emulated = emulated_scores(folder, tmp_path / "emulated.pt")
    found = {
        name: torch.cat(_engine(folder, layout, fp8).logprobs(sequences()).values) for name, fp8 in SECTIONS.items()
    }
    report("gap_bf16_gpu_cpu", _mean_gap(found["bf16"], emulated["bf16"]))
    for name in SECTIONS:
        error, gap = _mean_gap(emulated[name], emulated["bf16"]), _mean_gap(found[name], emulated[name])
        report(f"fp8_error_and_gap_{name}", (error, gap))
        assert name == "bf16" or _mean_gap(found[name], found["bf16"]) > 0.5 * error, f"{name}: FP8 is not on"
        assert name == "bf16" or gap < (0.5 if name == "storage" else 1.2) * error, f"{name}: the GPU rounds otherwise"


def test_pack_mates_change_a_blockwise_score_less_than_a_tensorwise_one(
    folder: Path, layout: Layout, report: Report
) -> None:
    gaps = {}
    for name in ("bf16", "blockwise", "tensorwise"):
        engine = _engine(folder, layout, SECTIONS[name])
        alone, together = engine.logprobs(sequences()[:1]).values[0], engine.logprobs(sequences()).values[0]
        gaps[name] = _mean_gap(alone, together)
        report(f"pack_mates_gap_{name}", gaps[name])
        again = engine.logprobs(sequences()).values[0]
        assert torch.equal(together, again), f"{name}: two equal calls differ"
    assert gaps["blockwise"] < gaps["tensorwise"]


@pytest.mark.parametrize("name", ["blockwise", "tensorwise", "storage"])
@pytest.mark.parametrize("length", [2, 7, 129])
def test_every_length_is_scored(folder: Path, layout: Layout, name: str, length: int) -> None:
    engine = _engine(folder, layout, SECTIONS[name])
    (values,) = engine.logprobs(random_sequences(VOCAB_SIZE, lengths=(length,))).values
    assert len(values) > 0
    assert bool(values.isfinite().all())


@pytest.mark.parametrize("name", ["blockwise", "tensorwise"])
def test_an_offloaded_model_scores_alike_and_leaves_nothing(folder: Path, layout: Layout, name: str) -> None:
    stays, offloaded = (_engine(folder, layout, SECTIONS[name], offload=offload) for offload in (False, True))
    on_host, held = offloaded.model.host_weight_bytes, stays.model.weight_bytes
    assert on_host == held
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        with offloaded.model.onloaded():
            assert torch.cuda.memory_allocated() - before >= held
        assert torch.cuda.memory_allocated() - before < 0.1 * held
        expected, found = (engine.logprobs(sequences()).values for engine in (stays, offloaded))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def _relative_rms(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def _mean_gap(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().mean().item()
