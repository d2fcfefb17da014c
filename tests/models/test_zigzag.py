"""The cut of a sequence over context-parallel ranks is Megatron's own, and can be undone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.models import attention
from megatron_rlt.models.attention import attend_cut, attend_packed
from megatron_rlt.models.zigzag import zigzag_part, zigzag_whole
from megatron_rlt.parallel.layout import Layout, build_layout
from tests.ranks import run_ranks

BOUNDARIES = [0, 24, 28, 76]
HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_parts_are_megatrons_rotary_positions_and_make_the_whole(cp: int) -> None:
    positions = torch.arange(4 * 2 * cp)
    parts = [zigzag_part(positions, cp, rank) for rank in range(cp)]
    for rank, part in enumerate(parts):
        # Megatron turns a packed sequence's tokens by this rank's rows of the table of all positions.
        assert torch.equal(part, _get_thd_freqs_on_this_cp_rank(rank, cp, part, positions))
    assert torch.equal(zigzag_whole(torch.stack(parts)), positions)


def _compare_cuts() -> tuple[bool, dict[str, float]]:
    """On two ranks: whether the cut is Megatron's, and the errors of outputs and gradients by size of a query block."""
    layout = build_layout(LayoutConfig(cp=2))
    ids = torch.arange(16)
    by_megatron = get_batch_on_this_cp_rank({"tokens": ids[None]}, layout.cp_group)["tokens"][0]
    errors = {}
    for attention._QUERY_BLOCK in (256, 5):  # short sequences have many blocks then; the process ends with this test
        for name, found, right in zip(("output", "query", "key", "value"), _cut(layout), _whole(layout), strict=True):
            errors[f"{name}, blocks of {attention._QUERY_BLOCK}"] = float((found - right).abs().max())
    return torch.equal(zigzag_part(ids, 2, layout.cp_rank), by_megatron), errors


def _inputs() -> tuple[list[Tensor], Tensor]:
    """Query, key and value; and what the output is multiplied by, for the gradients."""
    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(BOUNDARIES[-1], count, SIZE, generator=generator) for count in (HEADS, KV_HEADS, KV_HEADS)]
    return heads, torch.randn(BOUNDARIES[-1], HEADS * SIZE, generator=generator)


def _mine(values: Tensor, layout: Layout) -> Tensor:
    pieces = [values[start:stop] for start, stop in pairwise(BOUNDARIES)]
    return torch.cat([zigzag_part(piece, layout.cp, layout.cp_rank) for piece in pieces])


def _cut(layout: Layout) -> list[Tensor]:
    heads, weights = _inputs()
    parts = [_mine(values, layout).requires_grad_() for values in heads]
    output = attend_cut(*parts, BOUNDARIES, cp_group=layout.cp_group, scale=SCALE)
    return [output, *torch.autograd.grad((output * _mine(weights, layout)).sum(), parts)]


def _whole(layout: Layout) -> list[Tensor]:
    heads, weights = _inputs()
    output = attend_packed(*(values.requires_grad_() for values in heads), BOUNDARIES, scale=SCALE)
    return [_mine(values, layout) for values in (output, *torch.autograd.grad((output * weights).sum(), heads))]


def test_cut_attention_and_its_gradients_equal_the_whole() -> None:
    for is_megatrons, errors in run_ranks(_compare_cuts, 2):
        assert is_megatrons
        # Sums in another order: outputs are of size 1, gradients up to 10.
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
        assert len(errors) == 8
