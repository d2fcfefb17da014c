"""E4M3 codes and scales by hand, and what holds for every matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlt.config.fp8 import Fp8Config
from megatron_rlt.models.quantise import dequantise, has_power_of_two_scales, input_block, quantise, weight_block

SECTIONS = (Fp8Config(), Fp8Config(scales="power_of_two"), Fp8Config(recipe="tensorwise"), Fp8Config(recipe="mxfp8"))


def _rounded(values: Tensor, fp8: Fp8Config) -> Tensor:
    block = input_block(fp8)
    return dequantise(*quantise(values, block, power_of_two=has_power_of_two_scales(fp8)), block)


def test_codes_of_one_block_by_hand() -> None:
    # The largest is 448, so the scale is 1. E4M3 has 3 mantissa bits: 17 lies between 16 and 18, 19 between 18 and 20,
    # both ties, which go to the even mantissa (16 = 1.000, 20 = 1.010); 15.4 rounds to 15, -300 to -288 (steps of 32
    # from 256, where 304 would be the tie). The smallest subnormal is 2^-9: half of it is a tie and goes to 0, a bit
    # more goes to 2^-9, three halves to 2 x 2^-9.
    values = torch.tensor([[448, 17, 19, 15.4, -300, 2.0**-10, 2.0**-10 * 1.01, 3 * 2.0**-10, 0.0]])
    codes, factors = quantise(values, (0, 0), power_of_two=False)
    assert factors.tolist() == [[1.0]]
    assert codes.float().tolist() == [[448, 16, 20, 15, -288, 0, 2.0**-9, 2.0**-8, 0]]


def test_scales_by_hand() -> None:
    # Largest 7: 448 / 7 = 64 exactly, a power of two in any case. Largest 6: 448 / 6 = 74.67, as a power of two 64, so
    # that 6 becomes the code 384, and 5 becomes 320 (of 373.3, rounded to 384, with the float32 scale).
    for largest, power_of_two, scale in (
        (7.0, False, 64.0),
        (7.0, True, 64.0),
        (6.0, False, 448 / 6),
        (6.0, True, 64.0),
    ):
        _, factors = quantise(torch.tensor([[largest, 1.0]]), (0, 0), power_of_two=power_of_two)
        assert factors.item() == pytest.approx(1 / scale, rel=1e-7)
    values = torch.tensor([[6.0, 5.0]])
    assert quantise(values, (0, 0), power_of_two=True)[0].float().tolist() == [[384, 320]]
    assert quantise(values, (0, 0), power_of_two=False)[0].float().tolist() == [[448, 384]]


def test_each_block_has_its_scale_and_the_last_may_be_smaller() -> None:
    values = torch.ones(3, 300)
    values[:, 128:256] = 1e-3
    values[2] *= 1e4
    by_row = quantise(values, (1, 128), power_of_two=False)[1]
    assert by_row.shape == (3, 3)
    torch.testing.assert_close(by_row[:2] * 448, torch.tensor([[1.0, 1e-3, 1.0]] * 2))
    torch.testing.assert_close(by_row[2] * 448, torch.tensor([1e4, 10.0, 1e4]))
    assert quantise(values, (128, 128), power_of_two=False)[1].shape == (1, 3)
    assert quantise(values, (0, 0), power_of_two=False)[1].shape == (1, 1)
    assert quantise(values, (1, 32), power_of_two=True)[1].shape == (3, 10)


def test_what_overflows_saturates_and_zeros_stay() -> None:
    # A scale is finite also where 448 / largest is not, and zeros get the factor 1.
    codes, factors = quantise(torch.tensor([[0.0, 0.0], [1e-38, -1e-38]]), (1, 2), power_of_two=False)
    assert codes.float()[0].tolist() == [0, 0]
    assert factors[0].item() == 1
    assert bool(codes.float().isfinite().all())
    assert factors[1].item() == pytest.approx(1 / torch.finfo(torch.float32).max)


def test_blocks_of_the_recipes() -> None:
    blocks = [(weight_block(fp8), input_block(fp8)) for fp8 in SECTIONS]
    assert blocks == [((128, 128), (1, 128))] * 2 + [((0, 0), (0, 0)), ((1, 32), (1, 32))]
    assert [has_power_of_two_scales(fp8) for fp8 in SECTIONS] == [False, True, False, True]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
    fp8=st.sampled_from(SECTIONS),
)
def test_every_matrix(rows: int, columns: int, exponent: int, seed: int, fp8: Fp8Config) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).bfloat16().float()
    rounded = _rounded(values, fp8)
    # Half a step of 3 mantissa bits, or of the subnormals below 2^-6 times the block's factor; a bound for both rules.
    bound = values.abs() * 2.0**-4 + values.abs().max() / 224 * 2.0**-10
    assert bool(((rounded - values).abs() <= bound * (1 + 1e-6)).all())
    torch.testing.assert_close(_rounded(rounded, fp8), rounded, rtol=1e-6, atol=0)  # rounding again changes nothing
    if has_power_of_two_scales(fp8):
        assert torch.equal(rounded.bfloat16().float(), rounded), "such a value is a bfloat16 number"
        assert torch.equal(_rounded(values * 8, fp8), rounded * 8), "a factor of 8 moves only the scales"


def test_a_row_does_not_see_other_rows_except_tensorwise() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 256, generator=generator)
    mates = torch.cat([values, 50 * torch.randn(4, 256, generator=generator)])
    alike = [torch.equal(_rounded(values, fp8), _rounded(mates, fp8)[:4]) for fp8 in SECTIONS]
    assert alike == [True, True, False, True]
