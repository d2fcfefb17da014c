"""Quantises matrices to FP8 (E4M3) by the rules of Transformer Engine's recipes, in plain torch.

A recipe is the shape of the block that shares a scale. The values equal Transformer Engine's own reference quantisers
(its `tests/pytorch/references`), bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlt.config.fp8 import BLOCK, Fp8Config

Block = tuple[int, int]  # rows and columns that share a scale; 0: all

E4M3_MAX = 448.0


def weight_block(fp8: Fp8Config) -> Block:
    """The block of a weight `[out, in]`."""
    size = BLOCK[fp8.recipe]
    return {"blockwise": (size, size), "mxfp8": (1, size), "tensorwise": (0, 0)}[fp8.recipe]


def input_block(fp8: Fp8Config) -> Block:
    """The block of an input `[tokens, in]`."""
    size = BLOCK[fp8.recipe]
    return {"blockwise": (1, size), "mxfp8": (1, size), "tensorwise": (0, 0)}[fp8.recipe]


def has_power_of_two_scales(fp8: Fp8Config) -> bool:
    return fp8.recipe == "mxfp8" or (fp8.recipe == "blockwise" and fp8.scales == "power_of_two")


def quantise(values: Tensor, block: Block, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Quantise `[R, C]` values.

    Returns:
        Codes `[R, C]` in float8_e4m3fn, and the float32 factor of each block, `[ceil(R / rows), ceil(C / columns)]`: a
        code times its factor approximates the value.
    """
    tiles = _tiles(values.float(), block)
    amax = tiles.abs().amax(dim=(1, 3))
    scale = _scale(amax, power_of_two=power_of_two, largest=torch.finfo(values.dtype).max)
    # Clamped because torch before 2.13 turns what is too large into nan instead of 448.
    codes = (tiles * scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    whole = codes.flatten(2).flatten(0, 1)
    return whole[: values.size(0), : values.size(1)].contiguous(), scale.reciprocal()


def dequantise(codes: Tensor, factors: Tensor, block: Block) -> Tensor:
    """The float32 values `[R, C]` of `quantise`'s result."""
    tiles = _tiles(codes.float(), block) * factors[:, None, :, None]
    return tiles.flatten(2).flatten(0, 1)[: codes.size(0), : codes.size(1)]


def _tiles(values: Tensor, block: Block) -> Tensor:
    """`[R, C]` padded with zeros and split into blocks: `[block rows, rows, block columns, columns]`."""
    rows, columns = (size or whole for size, whole in zip(block, values.shape, strict=True))
    padded = F.pad(values, (0, -values.size(1) % columns, 0, -values.size(0) % rows))
    return padded.view(padded.size(0) // rows, rows, padded.size(1) // columns, columns)


def _scale(amax: Tensor, *, power_of_two: bool, largest: float) -> Tensor:
    """What a block is multiplied by, so that its largest entry becomes 448; power_of_two: at most that."""
    scale = torch.full_like(amax, E4M3_MAX) / amax  # 448.0 / amax would round twice: torch multiplies by 1 / amax
    scale = torch.where(scale == torch.inf, largest, scale)
    if power_of_two:
        mantissa_and_exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), mantissa_and_exponent.exponent - 1)
    return torch.where(amax == 0, 1.0, scale)
