"""What a checkpoint holds of the next step comes back to the bit."""

from __future__ import annotations

import torch

from megatron_rlt.jobs.train.rollouts import groups_from_bytes, groups_to_bytes
from megatron_rlt.types import Completion, FinishReason, Problem, Prompt, RolloutGroup


def _completion(ids: list[int], seed: int, reason: FinishReason) -> Completion:
    logprobs = torch.arange(len(ids), dtype=torch.float32) / -3
    return Completion(torch.tensor(ids, dtype=torch.int64), logprobs, 0.7, reason, seed, policy_version=5)


def test_groups_come_back_as_they_were() -> None:
    groups = (
        RolloutGroup(
            Prompt(Problem("a", "wie groß?", "3"), torch.tensor([1, 2, 3])),
            (_completion([4, 5], 2**62 + 1, FinishReason.STOP), _completion([6], 8, FinishReason.LENGTH)),
        ),
        RolloutGroup(
            Prompt(Problem("b", "q", "s", "trace"), torch.tensor([9])), (_completion([], 1, FinishReason.STOP),)
        ),
    )
    back = groups_from_bytes(groups_to_bytes(groups))
    assert [group.prompt.problem for group in back] == [group.prompt.problem for group in groups]
    for group, expected in zip(back, groups, strict=True):
        assert torch.equal(group.prompt.token_ids, expected.prompt.token_ids)
        for one, other in zip(group.completions, expected.completions, strict=True):
            assert torch.equal(one.token_ids, other.token_ids)
            assert one.token_ids.dtype == torch.int64
            assert torch.equal(one.rollout_logprobs, other.rollout_logprobs)
            assert (one.temperature, one.finish_reason, one.seed, one.policy_version) == (
                other.temperature,
                other.finish_reason,
                other.seed,
                other.policy_version,
            )
