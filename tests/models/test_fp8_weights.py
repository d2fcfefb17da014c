"""A loaded FP8 weight is the quantised Hugging Face weight, wherever it is split, and has the planned bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.config.models import LayoutConfig, ModelConfig
from megatron_rlt.config.plan import model_plan
from megatron_rlt.jobs.run.load_models import load_frozen_model
from megatron_rlt.models.checksum import checksum
from megatron_rlt.models.fp8 import held_tensors, quantised_parameters
from megatron_rlt.models.fp8_linear import EmulatedFp8Linear
from megatron_rlt.models.language_model import LanguageModel
from megatron_rlt.models.quantise import dequantise, has_power_of_two_scales, quantise, weight_block
from megatron_rlt.parallel.layout import build_layout
from tests.fp8_scores import small_model
from tests.models.loading import folder_tensors
from tests.ranks import run_ranks

RECIPES = (Fp8Config(), Fp8Config(scales="power_of_two"), Fp8Config(recipe="tensorwise"), Fp8Config(recipe="mxfp8"))
LAYOUTS = (LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2))
QUERIES, HEAD = 2, 128  # query heads per key-value head, and a head's size, of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("fp8") / "model")


def _whole(stored: dict[str, Tensor], layer: int, tp: int, rank: int) -> dict[str, Tensor]:
    """One rank's four weights of a layer, put together by hand from the folder's tensors."""
    prefix = f"model.layers.{layer}."
    query, key, value, output = (stored[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo")
    gate, up, down = (stored[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    heads = range(len(key) // HEAD)[rank * len(key) // HEAD // tp : (rank + 1) * len(key) // HEAD // tp]
    qkv = [
        part
        for head in heads
        for part in (
            query[head * QUERIES * HEAD : (head + 1) * QUERIES * HEAD],
            key[head * HEAD : (head + 1) * HEAD],
            value[head * HEAD : (head + 1) * HEAD],
        )
    ]
    return {
        "self_attention.linear_qkv": torch.cat(qkv),
        "self_attention.linear_proj": output.chunk(tp, dim=1)[rank],
        "mlp.linear_fc1": torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]),
        "mlp.linear_fc2": down.chunk(tp, dim=1)[rank],
    }


def _check_weights(folder: Path) -> list[str]:
    """What differs from the rule, over recipes and layouts, on this rank."""
    wrong, stored = [], folder_tensors(folder)
    for config in LAYOUTS:
        layout = build_layout(config)
        for fp8 in RECIPES:
            model = load_frozen_model(ModelConfig(model=folder, fp8=fp8, layout=config), layout)
            for layer in model.decoder.layers:
                expected = _whole(stored, layer.layer_number - 1, layout.tp, layout.tp_rank)
                for name, values in expected.items():
                    held, block = layer.get_submodule(name), weight_block(fp8)
                    codes, factors = quantise(values, block, power_of_two=has_power_of_two_scales(fp8))
                    assert isinstance(held, EmulatedFp8Linear)
                    same = torch.equal(held.weight.view(torch.uint8), codes.view(torch.uint8))
                    if not same or not torch.equal(held.weight_values(), dequantise(codes, factors, block)):
                        wrong.append(f"{config} {fp8.recipe} {name}")
            wrong += _check_bytes(model, folder, fp8, config)
            wrong += [name for name, one in model.named_parameters() if one.requires_grad]
    return wrong


def _check_bytes(model: LanguageModel, folder: Path, fp8: Fp8Config, config: LayoutConfig) -> list[str]:
    """Bytes against the tensors' storage, and the fullest rank's (the last stage's) against the plan."""
    stored = sum(tensor.untyped_storage().nbytes() for tensor in held_tensors(model))
    section = ModelConfig(model=folder, fp8=fp8, layout=config)
    planned = model_plan("m", section, Architecture.from_folder(folder), 2, use="frozen").weight_bytes
    fits = model.weight_bytes == stored and (not model.post_process or model.weight_bytes == planned)
    return [] if fits else [f"{config} {fp8.recipe}: {model.weight_bytes} bytes, stored {stored}, planned {planned}"]


def test_weights_are_the_quantised_shards_and_as_large_as_planned(folder: Path) -> None:
    assert run_ranks(_check_weights, 2, folder) == [[], []]


def _what_stays_bf16(folder: Path) -> list[list[str]]:
    layout, found = build_layout(LayoutConfig(pp=2)), []
    for fp8 in (Fp8Config(bf16_linears=("fc2", "qkv")), Fp8Config(bf16_layers_at_ends=1)):
        model = load_frozen_model(ModelConfig(model=folder, fp8=fp8, layout=LayoutConfig(pp=2)), layout)
        numbers = [str(layer.layer_number - 1) for layer in model.decoder.layers]
        names = [name.split(".") for name, _ in quantised_parameters(model)]
        found.append([f"{numbers[int(name[2])]} {name[-2]}" for name in names])
    return found


def test_linears_and_end_layers_stay_bf16(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", num_layers=4)
    first, last = run_ranks(_what_stays_bf16, 2, folder)
    assert first[0] == ["0 linear_proj", "0 linear_fc1", "1 linear_proj", "1 linear_fc1"]
    assert last[0] == ["2 linear_proj", "2 linear_fc1", "3 linear_proj", "3 linear_fc1"]
    four = ["linear_proj", "linear_qkv", "linear_fc1", "linear_fc2"]
    assert (first[1], last[1]) == ([f"1 {name}" for name in four], [f"2 {name}" for name in four])


def test_a_checksum_is_of_the_codes() -> None:
    codes = quantise(torch.randn(4, 4), (0, 0), power_of_two=False)[0]
    assert checksum(codes) == checksum(codes.clone())
    other = codes.view(torch.uint8).clone()
    other[3, 3] ^= 1
    assert checksum(codes) != checksum(other.view(torch.float8_e4m3fn))
    assert checksum(codes) != checksum(codes.float())
