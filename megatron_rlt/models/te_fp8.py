"""FP8 by Transformer Engine. Import it only with Transformer Engine."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from transformer_engine.common.recipe import Float8BlockScaling
from transformer_engine.pytorch import autocast, quantized_model_init

from megatron_rlt.config.fp8 import Fp8Config


@cache
def in_bf16(linear: Any) -> Any:  # noqa: ANN401 - a class of Megatron's, which has no types
    """A subclass of one of Megatron's Transformer Engine linears that stays bfloat16 inside an FP8 model."""

    class Bf16Linear(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the linear's own
            with quantized_model_init(enabled=False):
                super().__init__(*args, **kwargs)

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            with autocast(enabled=False):
                output: tuple[Tensor, Tensor | None] = super().forward(hidden)
            return output

    return Bf16Linear


def check_scales(fp8: Fp8Config) -> None:
    """Assert that Transformer Engine, which reads its environment when imported, has the configured scales."""
    if fp8.recipe == "blockwise":
        has_float32 = Float8BlockScaling.use_f32_scales
        assert has_float32 == (fp8.scales == "float32"), (
            f"Transformer Engine was imported with float32 scales {'on' if has_float32 else 'off'}, but"
            f" fp8.scales={fp8.scales}; parallel.environment.set_block_scales comes before any import of Megatron"
        )
