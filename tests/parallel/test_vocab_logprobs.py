"""The blocked, vocabulary-parallel log-prob against a dense log_softmax in float64, and what it allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlt.parallel.vocab_logprobs import vocab_parallel_logprobs
from tests.ranks import run_ranks


def problem(rows: int, hidden_size: int, padded_vocab: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator)
    weight = torch.randn(padded_vocab, hidden_size, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)  # gradient that arrives at the log-probs
    return hidden, weight, targets, upstream


def dense(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().t()[:, :vocab_size] / temperature
    distribution = torch.log_softmax(logits, -1)
    return distribution.gather(1, targets[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)


def gradients(logprobs: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((logprobs * upstream).sum(), inputs)


def check_against_dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    row_block: int,
    vocab_block: int,
    atol: float = 1e-5,
    grad_atol: float = 1e-4,
) -> None:
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=None,
        row_block=row_block,
        vocab_block=vocab_block,
    )
    expected, expected_entropy = dense(hidden, weight, targets, temperature, vocab_size)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=atol)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=atol)
    assert not entropy.requires_grad
    grads = gradients(logprobs, upstream, hidden, weight)
    expected_grads = gradients(expected, upstream.double(), hidden, weight)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad.to(grad.dtype), rtol=1e-5, atol=grad_atol)
    assert not grads[1][vocab_size:].any(), "padding entries got a gradient"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab_size=st.integers(1, 23),
    padding=st.integers(0, 6),
    row_block=st.integers(1, 12),
    vocab_block=st.integers(1, 30),
    temperature=st.sampled_from([1.0, 0.7]),
)
def test_any_blocks_give_the_dense_values_and_gradients(
    rows: int, vocab_size: int, padding: int, row_block: int, vocab_block: int, temperature: float
) -> None:
    inputs = problem(rows, 5, vocab_size + padding, vocab_size)
    check_against_dense(
        *inputs, vocab_size=vocab_size, temperature=temperature, row_block=row_block, vocab_block=vocab_block
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_ten_thousand_stay_exact(temperature: float) -> None:
    """Hidden 1-hot, so logits are the weights themselves, exact in fp32: no rounding of a product hides an error."""
    hidden = torch.eye(4)
    weight = torch.tensor([[1e4, -1e4, 0.0, 3.0], [9999.0, 1e4, 1.0, 1e4], [-1e4, 0.0, 2.0, 9998.0]])
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for vocab_block in (1, 2, 3):
        for target in range(3):
            check_against_dense(
                hidden.clone(),
                weight.clone(),
                torch.full((4,), target),
                upstream,
                vocab_size=3,
                temperature=temperature,
                row_block=2,
                vocab_block=vocab_block,
                # 1e4 / 0.7 itself is rounded to 1e-3 in fp32; gradients are sums of terms up to 3 * 1e4
                atol=2e-3 if temperature != 1.0 else 1e-6,
                grad_atol=3.0 if temperature != 1.0 else 3e-2,
            )


def test_bf16_inputs_lose_nothing_but_the_rounding_of_the_gradients() -> None:
    hidden, weight, targets, upstream = problem(33, 64, 200, 190)
    hidden, weight = hidden.bfloat16().requires_grad_(), (weight / 4).bfloat16().requires_grad_()
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, targets, temperature=0.7, vocab_size=190, tp_group=None, row_block=16, vocab_block=64
    )
    expected, _ = dense(hidden, weight, targets, 0.7, 190)
    # Rounding the logits to bf16, as a bf16 product does, would give errors near 1e-2.
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-5)
    grads = gradients(logprobs, upstream, hidden, weight)
    expected_grads = gradients(expected, upstream.double(), hidden, weight)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        error = (grad.double() - expected_grad.double()).norm() / expected_grad.double().norm()
        assert error < 6e-3, error


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_either_input_may_be_frozen(trained: str) -> None:
    hidden, weight, targets, upstream = problem(6, 5, 11, 11)
    wanted = (hidden if trained == "hidden" else weight).requires_grad_()
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, targets, temperature=0.7, vocab_size=11, tp_group=None, row_block=4, vocab_block=3
    )
    expected, _ = dense(hidden, weight, targets, 0.7, 11)
    (grad,), (expected_grad,) = gradients(logprobs, upstream, wanted), gradients(expected, upstream.double(), wanted)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_a_target_in_the_padding_is_refused() -> None:
    hidden, weight, _, _ = problem(2, 5, 12, 10)
    with pytest.raises(AssertionError, match=r"0\.\.9"):
        vocab_parallel_logprobs(
            hidden,
            weight,
            torch.tensor([3, 10]),
            temperature=1.0,
            vocab_size=10,
            tp_group=None,
            row_block=4,
            vocab_block=4,
        )


def test_a_non_finite_row_is_nan_and_leaves_the_others_alone() -> None:
    hidden, weight, targets, _ = problem(3, 5, 10, 10)
    hidden[1, 2] = float("inf")
    logprobs, _ = vocab_parallel_logprobs(
        hidden, weight, targets, temperature=1.0, vocab_size=10, tp_group=None, row_block=4, vocab_block=4
    )
    assert logprobs.isnan().tolist() == [False, True, False]


def shards_agree_with_dense(world_size: int, vocab_size: int, rows: int, temperature: float) -> None:
    padded = 2 * 7 * world_size // 2
    hidden, weight, targets, upstream = problem(rows, 5, padded, vocab_size)
    shard_rows = padded // world_size
    own = slice(dist.get_rank() * shard_rows, (dist.get_rank() + 1) * shard_rows)
    shard = weight[own].clone().requires_grad_()
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        shard,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
        row_block=4,
        vocab_block=3,
    )
    expected, expected_entropy = dense(hidden, weight, targets, temperature, vocab_size)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-5)
    part, grad_shard = gradients(logprobs, upstream, hidden, shard)
    dist.all_reduce(part)
    grad_hidden, grad_weight = gradients(expected, upstream.double(), hidden, weight)
    torch.testing.assert_close(part, grad_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_shard, grad_weight[own], rtol=1e-5, atol=1e-5)


def all_shard_cases() -> None:
    for rows in (0, 1, 9):
        for temperature in (1.0, 0.7):
            shards_agree_with_dense(2, 14, rows, temperature)
            shards_agree_with_dense(2, 12, rows, temperature)
            shards_agree_with_dense(2, 5, rows, temperature)  # the second shard is padding only


def test_two_shards_give_the_dense_values_and_gradients() -> None:
    run_ranks(all_shard_cases, 2)


def peak_bytes(way: str) -> int:
    """Peak resident memory of one forward and backward pass, above what inputs and gradients need."""
    rows, hidden_size, vocab_size = 4096, 64, 32_000
    hidden, weight, targets, _ = problem(rows, hidden_size, vocab_size, vocab_size)
    hidden.requires_grad_(), weight.requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden) + 1, torch.zeros_like(weight) + 1
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = memory_status("VmRSS")
    if way == "full":
        logits = hidden @ weight.t() / 0.7
        logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    else:
        logprobs, _ = vocab_parallel_logprobs(
            hidden,
            weight,
            targets,
            temperature=0.7,
            vocab_size=vocab_size,
            tp_group=None,
            row_block=2048,
            vocab_block=2048,
        )
    logprobs.sum().backward()
    return memory_status("VmHWM") - before


def memory_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def test_forward_and_backward_allocate_less_than_a_tenth_of_the_full_logits_path() -> None:
    """4,096 rows x 32,000 entries: one fp32 logits tensor is 524 MB, and the dense way holds several."""
    (blocked,) = run_ranks(peak_bytes, 1, "blocked")
    (full,) = run_ranks(peak_bytes, 1, "full")
    print(f"peak: blocked {blocked / 1e6:.0f} MB, full {full / 1e6:.0f} MB")
    assert full > 2 * 4096 * 32_000 * 4, "the dense path was not measured"
    assert blocked < 0.1 * full, f"blocked {blocked / 1e6:.0f} MB, full {full / 1e6:.0f} MB"
