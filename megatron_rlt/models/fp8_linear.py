"""FP8 linear layers without Transformer Engine: Megatron's parallel linears with operands quantised in plain torch.

Weights are stored as FP8 codes and factors; products are float32 on the dequantised operands, so that only the rounding
of operands is emulated, not how a GPU's tensor cores accumulate. Communication is Megatron's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.quantise import dequantise, has_power_of_two_scales, input_block, quantise, weight_block


class EmulatedFp8Linear(nn.Module):
    """What column- and row-parallel linears share."""

    weight: Tensor  # [out, in] float8_e4m3fn: codes
    weight_factors: Tensor  # one a block: float32; float8_e8m0fnu of recipe mxfp8

    def hold_fp8(self, fp8: Fp8Config) -> None:
        """Replace the weight that Megatron has allocated by FP8 storage, undefined like it."""
        self._fp8 = fp8
        codes, factors = self._quantise(torch.zeros_like(self.weight))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_factors", factors, persistent=False)

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Quantise `[out, in]` values into the weight."""
        codes, factors = self._quantise(values)
        self.weight.copy_(codes)
        self.weight_factors.copy_(factors)

    def weight_values(self) -> Tensor:
        """The weight's values, `[out, in]` float32."""
        return dequantise(self.weight, self.weight_factors.float(), weight_block(self._fp8))

    def _quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        power_of_two = has_power_of_two_scales(self._fp8)
        codes, factors = quantise(values, weight_block(self._fp8), power_of_two=power_of_two)
        return codes, factors.to(torch.float8_e8m0fnu) if self._fp8.recipe == "mxfp8" else factors

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        sequence_parallel: bool,
        tp_group: Any,  # noqa: ANN401 - a process group or None
        **_: object,
    ) -> Tensor:
        assert weight is self.weight, "an emulated FP8 linear multiplies with its own weight"
        # Transformer Engine quantises before it gathers, with one amax over the ranks where a scale spans tokens.
        whole = gather_from_sequence_parallel_region(input, group=tp_group) if sequence_parallel else input
        values = self.weight_values()
        if not self._fp8.activations:
            return F.linear(whole, values.to(whole.dtype), bias)
        block, power_of_two = input_block(self._fp8), has_power_of_two_scales(self._fp8)
        codes, factors = quantise(whole.flatten(0, -2), block, power_of_two=power_of_two)
        product = F.linear(dequantise(codes, factors, block), values, None if bias is None else bias.float())
        return product.to(whole.dtype).view(*whole.shape[:-1], -1)


class EmulatedFp8Column(EmulatedFp8Linear, ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel linear with FP8 operands."""

    def __init__(self, *args: Any, fp8: Fp8Config, **kwargs: Any) -> None:  # noqa: ANN401 - ColumnParallelLinear's
        ColumnParallelLinear.__init__(self, *args, **kwargs)
        self.hold_fp8(fp8)


class EmulatedFp8Row(EmulatedFp8Linear, RowParallelLinear):  # type: ignore[misc]
    """A row-parallel linear with FP8 operands; each rank quantises its own part of the input."""

    def __init__(self, *args: Any, fp8: Fp8Config, **kwargs: Any) -> None:  # noqa: ANN401 - RowParallelLinear's
        RowParallelLinear.__init__(self, *args, **kwargs)
        self.hold_fp8(fp8)
