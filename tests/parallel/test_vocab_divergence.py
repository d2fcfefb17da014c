"""The exact divergence over the vocabulary against dense softmaxes in float64, weights whole and broadcast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlt.parallel.vocab_divergence import broadcast_weight_blocks, pair_weight_blocks, vocab_divergence
from tests.ranks import run_ranks


def models(rows: int, vocab_size: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows and output weights of p (hidden size 5) and q (hidden size 3)."""
    generator = torch.Generator().manual_seed(rows + vocab_size)
    shapes = ((rows, 5), (rows, 3), (vocab_size, 5), (vocab_size, 3))
    p_hidden, q_hidden, p_weight, q_weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return p_hidden, q_hidden, p_weight * scale, q_weight * scale


def dense(p_hidden: Tensor, q_hidden: Tensor, p_weight: Tensor, q_weight: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(p_hidden.double() @ p_weight.double().t() / temperature, -1)
    log_q = torch.log_softmax(q_hidden.double() @ q_weight.double().t() / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def local_blocks(p_weight: Tensor, q_weight: Tensor, block: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    for start in range(0, p_weight.shape[0], block):
        stop = min(start + block, p_weight.shape[0])
        yield start, stop, p_weight[start:stop], q_weight[start:stop]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 7),
    vocab_size=st.integers(1, 23),
    block=st.integers(1, 25),
    row_block=st.integers(1, 8),
    temperature=st.sampled_from([1.0, 0.7]),
)
def test_any_blocks_give_the_dense_divergence(
    rows: int, vocab_size: int, block: int, row_block: int, temperature: float
) -> None:
    p_hidden, q_hidden, p_weight, q_weight = models(rows, vocab_size)
    blocks = local_blocks(p_weight, q_weight, block)
    divergence = vocab_divergence(p_hidden, q_hidden, blocks, temperature=temperature, row_block=row_block)
    expected = dense(p_hidden, q_hidden, p_weight, q_weight, temperature)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=2e-6)


def test_two_entries_by_hand() -> None:
    """Logits (0, ln 3) and (0, 0): p = (1/4, 3/4), q = (1/2, 1/2); KL = ln(1/2)/4 + 3 ln(3/2)/4 = 0.130812."""
    p_weight = torch.tensor([[1.0], [3.0]]).log()
    one = torch.ones(1, 1)
    blocks = local_blocks(p_weight, torch.zeros(2, 1), 1)
    divergence = vocab_divergence(one, one, blocks, temperature=1.0, row_block=1)
    torch.testing.assert_close(divergence, torch.tensor([0.130812]), rtol=0, atol=1e-6)


def test_a_model_does_not_diverge_from_itself_even_at_logits_of_ten_thousand() -> None:
    p_hidden, _, p_weight, _ = models(6, 40, scale=4e3)
    blocks = local_blocks(p_weight, p_weight, 7)
    divergence = vocab_divergence(p_hidden, p_hidden, blocks, temperature=0.7, row_block=4)
    assert divergence.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [100.0, 4e3])
def test_extreme_logits_keep_the_relative_accuracy_of_fp32(scale: float) -> None:
    p_hidden, q_hidden, p_weight, q_weight = models(6, 40, scale)
    blocks = local_blocks(p_weight, q_weight, 7)
    divergence = vocab_divergence(p_hidden, q_hidden, blocks, temperature=1.0, row_block=4)
    expected = dense(p_hidden, q_hidden, p_weight, q_weight, 1.0)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=scale * 3e-6)


def broadcast_case(vocab_size: int, shard_rows: int, block: int, rows: int) -> None:
    """p lives in two shards on ranks 1 and 0 (in this order), q whole on rank 1; rank 0 has `rows`, rank 1 the rest."""
    rank = dist.get_rank()
    p_hidden, q_hidden, p_weight, q_weight = models(6, vocab_size)
    padded = torch.full((2 * shard_rows, 5), float("nan"))  # padding must never be read
    padded[:vocab_size] = p_weight
    place = 1 - rank
    common = {"vocab_size": vocab_size, "block": block, "group": None, "dtype": torch.float32}
    device = torch.device("cpu")
    shard = padded[place * shard_rows : (place + 1) * shard_rows]
    p_blocks = broadcast_weight_blocks(
        shard, owners=[1, 0], shard_rows=shard_rows, hidden_size=5, device=device, **common
    )
    q_shard = q_weight if rank == 1 else None
    q_blocks = broadcast_weight_blocks(
        q_shard, owners=[1], shard_rows=vocab_size, hidden_size=3, device=device, **common
    )
    own = slice(0, rows) if rank == 0 else slice(rows, 6)
    weights = pair_weight_blocks(p_blocks, q_blocks)
    divergence = vocab_divergence(p_hidden[own], q_hidden[own], weights, temperature=0.7, row_block=2)
    expected = dense(p_hidden, q_hidden, p_weight, q_weight, 0.7)[own]
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=2e-6)


def all_broadcast_cases() -> None:
    for vocab_size, shard_rows in ((14, 7), (12, 7), (5, 7)):
        for block in (3, 7, 50):  # 3 reaches over the border of the shards
            for rows in (6, 2):  # rank 1 has no rows, or four
                broadcast_case(vocab_size, shard_rows, block, rows)


def test_broadcast_weights_of_two_layouts_give_the_dense_divergence() -> None:
    run_ranks(all_broadcast_cases, 2)


def test_blocks_that_do_not_match_are_refused() -> None:
    blocks = [(0, 2, torch.zeros(2, 5))], [(0, 3, torch.zeros(3, 5))]
    with pytest.raises(AssertionError, match=r"\[0, 2\) and \[0, 3\)"):
        list(pair_weight_blocks(iter(blocks[0]), iter(blocks[1])))
