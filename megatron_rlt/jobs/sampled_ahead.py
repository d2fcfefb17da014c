"""Groups of completions as bytes, for the checkpoint of a run that samples ahead of its steps.

Tokens and log-probs come back to the bit: a resumed run trains on what was sampled, whose weights no longer exist.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rlt.data.shards import problem_from_json, problem_to_json
from megatron_rlt.types import Completion, FinishReason, Prompt, RolloutGroup


def groups_to_bytes(groups: Sequence[RolloutGroup]) -> bytes:
    """All that a group holds."""
    buffer = io.BytesIO()
    torch.save([_group_record(group) for group in groups], buffer)
    return buffer.getvalue()


def groups_from_bytes(data: bytes) -> tuple[RolloutGroup, ...]:
    """The inverse of `groups_to_bytes`."""
    return tuple(_group(record) for record in torch.load(io.BytesIO(data), weights_only=True))


def _group_record(group: RolloutGroup) -> dict[str, Any]:
    return {
        "problem": problem_to_json(group.prompt.problem),
        "prompt": group.prompt.token_ids,
        "completions": [vars(one) | {"finish_reason": one.finish_reason.value} for one in group.completions],
    }


def _group(record: dict[str, Any]) -> RolloutGroup:
    completions = (
        Completion(**(one | {"finish_reason": FinishReason(one["finish_reason"])})) for one in record["completions"]
    )
    return RolloutGroup(Prompt(problem_from_json(record["problem"]), record["prompt"]), tuple(completions))
