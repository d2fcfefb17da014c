"""FP8's rules that no configuration file can break, and its bytes by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlt.config.architecture import Architecture
from megatron_rlt.config.fp8 import Fp8Config, hardware_fault
from megatron_rlt.config.models import LayoutConfig, ModelConfig
from megatron_rlt.config.plan import model_plan
from tests.config.model_folders import model_folder
from tests.config.test_shipped_configurations import QWEN_7B, QWEN_32B

ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
POWER_OF_TWO = Fp8Config(scales="power_of_two")
TENSORWISE, MXFP8 = Fp8Config(recipe="tensorwise"), Fp8Config(recipe="mxfp8")


@pytest.mark.parametrize(
    ("fp8", "capability", "cuda", "fault"),
    [
        (Fp8Config(), HOPPER, (13, 0), None),
        (Fp8Config(), HOPPER, (12, 9), None),
        (Fp8Config(), HOPPER, (12, 8), "recipe=blockwise: needs CUDA 12.9, torch has 12.8; set recipe=tensorwise"),
        (
            Fp8Config(),
            ADA,
            (13, 0),
            "recipe=blockwise: needs compute capability 9 or 10, this GPU's compute capability is 8.9; set"
            " recipe=tensorwise",
        ),
        (
            Fp8Config(),
            BLACKWELL,
            (13, 0),
            "recipe=blockwise with scales=float32: this GPU's compute capability is 10.0; set scales=power_of_two, or"
            " recipe=mxfp8",
        ),
        (POWER_OF_TWO, BLACKWELL, (13, 0), None),
        (MXFP8, BLACKWELL, (13, 0), None),
        (
            MXFP8,
            HOPPER,
            (13, 0),
            "recipe=mxfp8: needs compute capability 10, this GPU's compute capability is 9.0; set recipe=blockwise",
        ),
        (
            MXFP8,
            CONSUMER_BLACKWELL,
            (13, 0),
            "recipe=mxfp8: needs compute capability 10, this GPU's compute capability is 12.0; set recipe=tensorwise",
        ),
        (TENSORWISE, ADA, (12, 4), None),
        (
            TENSORWISE,
            (8, 0),
            (13, 0),
            "recipe=tensorwise: needs compute capability 8.9, this GPU's compute capability is 8.0; set"
            " activations=false",
        ),
        (Fp8Config(activations=False), (8, 0), (12, 4), None),
    ],
)
def test_what_a_gpu_cannot_run_is_named_with_what_it_can(
    fp8: Fp8Config, capability: tuple[int, int], cuda: tuple[int, int], fault: str | None
) -> None:
    assert hardware_fault(fp8, capability, cuda) == fault


def _gigabytes(shape: Architecture, fp8: Fp8Config | None, **layout: int) -> float:
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    model = ModelConfig(model=Path("m"), fp8=fp8, layout=LayoutConfig(tp=tp, pp=pp))
    return model_plan("m", model, shape, tp * pp, use="frozen").weight_bytes / 1e9


def test_bytes_of_published_models(tmp_path: Path) -> None:
    """Of 7.62 billion parameters 6.53 are in linear layers: 6.53 x 1 + 1.09 x 2 bytes; of 32.8 billion 31.2 are."""
    small, large = (
        Architecture.from_folder(model_folder(tmp_path / name, **size))
        for name, size in (("7b", QWEN_7B), ("32b", QWEN_32B))
    )
    assert (round(_gigabytes(small, None), 1), round(_gigabytes(small, Fp8Config()), 1)) == (15.2, 8.7)
    assert (round(_gigabytes(large, None), 1), round(_gigabytes(large, Fp8Config()), 1)) == (65.5, 34.3)
    # A thirty-second of a byte more per weight: 6.53e9 / 32 = 0.2 GB.
    assert _gigabytes(small, MXFP8) - _gigabytes(small, Fp8Config()) == pytest.approx(0.2, abs=0.01)


def test_bytes_of_a_stage_by_hand() -> None:
    # Linear weights of a layer at tp 2: qkv [(256 + 2 x 128) / 2 = 256, 256] = 65,536; proj [256, 128] = 32,768;
    # fc1 [512, 256] = 131,072; fc2 [256, 256] = 65,536. Blocks of 128 x 128: 4, 2, 8, 4 scales of 4 bytes.
    shape = Architecture(
        family="llama",
        num_layers=4,
        hidden_size=256,
        ffn_size=512,
        num_heads=2,
        num_kv_heads=1,
        head_dim=128,
        vocab_size=100,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        norm_epsilon=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        max_positions=64,
    )
    layer, scales = 65_536 + 32_768 + 131_072 + 65_536, 4 * (4 + 2 + 8 + 4)
    bf16 = _gigabytes(shape, None, tp=2, pp=2)
    saved = {
        Fp8Config(): 2 * (layer - scales),
        TENSORWISE: 2 * (layer - 4 * 4),
        Fp8Config(bf16_layers_at_ends=1): layer - scales,  # the last stage holds one of the two that stay
        Fp8Config(bf16_linears=("fc2",)): 2 * (layer - 65_536 - scales + 4 * 4),
    }
    for fp8, num_bytes in saved.items():
        assert (bf16 - _gigabytes(shape, fp8, tp=2, pp=2)) * 1e9 == pytest.approx(num_bytes), fp8
    whole = replace(shape, num_layers=3)
    assert (_gigabytes(whole, None) - _gigabytes(whole, Fp8Config(bf16_layers_at_ends=1))) * 1e9 == pytest.approx(
        2 * layer - 4 * 36
    )
