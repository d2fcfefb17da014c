"""Token weights and the policy loss: by hand, and its gradient against a dense formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlt.algorithm.policy_loss import LossSums, policy_loss
from megatron_rlt.algorithm.token_weights import token_weights


def test_sequence_mean_weights_by_hand() -> None:
    """Two valid completions of 2 and 5 tokens: 1/(2*2) and 1/(5*2); the invalid and the empty one count nowhere."""
    weights = token_weights([2, 7, 5, 0], [True, False, True, True], aggregation="sequence_mean")
    assert weights.tolist() == [0.25, 0.0, 0.1, 0.0]


def test_token_mean_weights_by_hand() -> None:
    """3 + 5 valid tokens: 1/8 each."""
    assert token_weights([3, 7, 5], [True, False, True], aggregation="token_mean").tolist() == [0.125, 0.0, 0.125]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_weights_of_no_valid_completion_are_zero_not_nan(aggregation: Any) -> None:
    assert token_weights([3, 4], [False, False], aggregation=aggregation).tolist() == [0.0, 0.0]


def loss_of(new: Tensor, **changes: Any) -> tuple[Tensor, LossSums]:
    arguments: dict[str, Any] = {
        "old_logprobs": None,
        "reference_logprobs": None,
        "advantages": torch.ones_like(new),
        "importance": None,
        "weights": torch.full_like(new, 1 / len(new)) if len(new) else new.detach(),
        "clip_low": None,
        "clip_high": None,
        "beta": 0.0,
    }
    return policy_loss(new, **(arguments | changes))


def test_loss_by_hand() -> None:
    """Ratios 1.5 and 0.5 (from old = new - ln ratio), advantages 2 and -1, weights 1/4 and 3/4.

    Policy part: -(1/4 * 3 - 3/4 * 0.5) = -0.375. Reference = new + ln 2, so k3 = 2 - 1 - ln 2 = 0.306853 at both;
    with beta 0.1 the loss is -0.375 + 0.0306853.
    """
    new = torch.tensor([-1.0, -2.0])
    loss, sums = loss_of(
        new,
        old_logprobs=new - torch.tensor([1.5, 0.5]).log(),
        reference_logprobs=new + math.log(2),
        advantages=torch.tensor([2.0, -1.0]),
        weights=torch.tensor([0.25, 0.75]),
        beta=0.1,
    )
    assert float(loss) == pytest.approx(-0.375 + 0.0306853, abs=1e-6)
    expected = [-0.375 + 0.0306853, -0.375, 0.306853, 1.0, 2.0, 2.0, 0.0, 2 * 0.306853]
    assert sums.to_vector().tolist() == pytest.approx(expected, abs=1e-5)


def test_clipping_by_hand() -> None:
    """Clip to [0.8, 1.3]; ratios 1.5, 1.5, 0.5, 0.5 with advantages +, -, +, -.

    Terms min(ratio A, clip A): 1.3, -1.5, 0.5, -0.8: the first and the last are clipped and lose their gradient.
    """
    new = torch.zeros(4, requires_grad=True)
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, sums = loss_of(new, old_logprobs=-ratios.log(), advantages=advantages, clip_low=0.2, clip_high=0.3)
    assert float(loss.detach()) == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8) / 4, abs=1e-6)
    assert float(sums.token_clipped) == 2
    loss.backward()
    # d(-w ratio A)/d new = -w ratio A where not clipped.
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0], abs=1e-6)


@pytest.mark.parametrize(("clip_low", "clip_high", "clipped"), [(0.2, None, [3]), (None, 0.3, [0]), (None, None, [])])
def test_an_open_side_is_not_clipped(clip_low: float | None, clip_high: float | None, clipped: list[int]) -> None:
    new = torch.zeros(4, requires_grad=True)
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, sums = loss_of(new, old_logprobs=-ratios.log(), advantages=advantages, clip_low=clip_low, clip_high=clip_high)
    loss.backward()
    assert new.grad is not None
    assert [index for index in range(4) if new.grad[index] == 0] == clipped
    assert float(sums.token_clipped) == len(clipped)


def test_without_old_logprobs_the_ratio_is_one_with_the_policy_gradient() -> None:
    """REINFORCE: the gradient is -w A at every token, and equals that of old = new."""
    new = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, sums = loss_of(new, advantages=advantages, clip_low=0.2, clip_high=0.2)
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.tolist() == pytest.approx((-advantages / 3).tolist(), abs=1e-7)
    same, _ = loss_of(new, advantages=advantages, old_logprobs=new.detach(), clip_low=0.2, clip_high=0.2)
    assert torch.equal(torch.autograd.grad(same, new)[0], grad)
    assert float(sums.token_ratio) == 3.0


def ragged_batch(seed: int = 0) -> dict[str, Any]:
    """Five completions of 1 to 6 tokens, one of them invalid and full of nan."""
    generator = torch.Generator().manual_seed(seed)
    lengths, valid = [3, 1, 6, 4, 2], [True, True, True, False, True]
    new = -torch.rand(sum(lengths), generator=generator) * 3
    old = new + torch.randn(len(new), generator=generator) * 0.3
    reference = new + torch.randn(len(new), generator=generator) * 0.3
    per_completion = torch.randn(5, generator=generator)
    advantages = per_completion.repeat_interleave(torch.tensor(lengths))
    old[10:14] = reference[10:14] = advantages[10:14] = float("nan")
    return {
        "lengths": lengths,
        "valid": valid,
        "new": new,
        "old": old,
        "reference": reference,
        "advantages": advantages,
        "per_completion": per_completion,
    }


def dense_loss(batch: dict[str, Any], new: Tensor, aggregation: str) -> Tensor:
    """The formula, one completion after the other, in float64."""
    columns = [column.double().split(batch["lengths"]) for column in (new, batch["old"], batch["reference"])]
    terms = []
    for n, o, r, advantage, valid in zip(*columns, batch["per_completion"].double(), batch["valid"], strict=True):
        if not valid:
            continue
        ratio = (n - o).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.25) * advantage)
        terms.append(-surrogate + 0.04 * ((r - n).exp() - (r - n) - 1))
    if aggregation == "sequence_mean":
        return torch.stack([term.mean() for term in terms]).mean()
    return torch.cat(terms).mean()


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("split", [[5], [1, 1, 1, 1, 1], [2, 3], [3, 1, 1]])
def test_loss_and_gradient_equal_the_dense_formula_however_the_batch_is_split(
    aggregation: Any, split: list[int]
) -> None:
    batch = ragged_batch()
    weights = token_weights(batch["lengths"], batch["valid"], aggregation=aggregation)
    weights = weights.repeat_interleave(torch.tensor(batch["lengths"]))
    new = batch["new"].clone().requires_grad_()
    parts, first = [], 0
    for size in split:  # micro-batches of so many completions
        stop = first + size
        rows = slice(sum(batch["lengths"][:first]), sum(batch["lengths"][:stop]))
        loss, sums = policy_loss(
            new[rows],
            old_logprobs=batch["old"][rows],
            reference_logprobs=batch["reference"][rows],
            advantages=batch["advantages"][rows],
            weights=weights[rows],
            importance=None,
            clip_low=0.2,
            clip_high=0.25,
            beta=0.04,
        )
        loss.backward()
        parts.append(sums)
        first = stop
    reference_input = batch["new"].clone().requires_grad_()
    expected = dense_loss(batch, reference_input, aggregation)
    expected.backward()
    total = LossSums.total(parts, torch.device("cpu"))
    assert float(total.loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(total.weight) == pytest.approx(1.0, abs=1e-6)
    assert int(total.num_tokens) == 12
    assert new.grad is not None
    assert reference_input.grad is not None
    torch.testing.assert_close(new.grad, reference_input.grad, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_without_valid_tokens_has_no_loss_but_a_graph() -> None:
    """All ranks must run the same backward passes, so the loss of nothing is 0 with zero gradients."""
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, sums = loss_of(new, weights=torch.zeros(2), advantages=torch.full((2,), float("nan")))
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0]
    assert sums.to_vector().tolist() == [0.0] * 8


def test_beta_without_a_reference_is_refused() -> None:
    with pytest.raises(AssertionError, match="reference"):
        loss_of(torch.zeros(2), beta=0.1)


def test_the_kl_estimates_policy_against_reference() -> None:
    """Enumeration: sum_x policy(x) k3(x) = KL(policy || reference)."""
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.2, 0.6])
    _, sums = loss_of(policy.log(), reference_logprobs=reference.log(), weights=policy, beta=1.0)
    exact = float((policy * (policy / reference).log()).sum())
    assert float(sums.kl) == pytest.approx(exact, abs=1e-6)
