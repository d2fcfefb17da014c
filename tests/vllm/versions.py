"""Completions of one policy version after the other, and what they are compared with: the dense model's and the
trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from megatron_rlt.types import Completion, FinishReason
from tests.vllm.policies import (
    MAX_COMPLETION_TOKENS,
    STOP_IDS,
    VOCAB_SIZE,
    Case,
    Colocated,
    Served,
    ask,
    dense_rollout_logprobs,
    make_requests,
    spanned,
    token_ids,
    train_a_little,
)


@dataclass
class Sampled:
    """Of each version: completions, the trainer's log-probs of them, metrics."""

    versions: Sequence[int]
    completions: list[list[Completion]] = field(default_factory=list)
    trainer: list[tuple[Tensor, ...]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    again: list[Completion] = field(default_factory=list)  # of the last version


def sample_versions(beside: Colocated | Served, case: Case, versions: Sequence[int], factor: float = 1.05) -> Sampled:
    """The policy changes after each version."""
    engine, requests, found = beside.engine, make_requests(), Sampled(versions)
    for version in versions:
        completions = engine.generate(requests, policy_version=version)
        sequences = [spanned(request, one) for request, one in zip(requests, completions, strict=True)]
        found.completions.append(completions)
        found.trainer.append(ask(beside.model, sequences, case.temperature))
        found.metrics.append(engine.take_metrics())
        # A server is asked for groups, whose completions follow from the first one's seed.
        is_served = isinstance(beside, Served)
        again = engine.generate(requests if is_served else requests[::-1], policy_version=version)
        found.again = again if is_served else again[::-1]
        assert "weight_sync_seconds" not in engine.take_metrics(), "the policy did not change, so nothing was sent"
        train_a_little(beside.model, factor)
    return found


def dense_policy(folder: Path, factors: Sequence[float] = ()) -> Any:
    """The policy as transformers runs it, after so many changes."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for factor in factors:
        train_a_little(dense, factor)
    return dense


def check_versions(dense: Any, case: Case, found: Sampled, other: Sampled, factor: float = 1.05) -> None:
    """What two ranks found, against the dense model, which has the weights of the first version."""
    requests = make_requests()
    seen: list[list[list[int]]] = []
    for number, completions in enumerate(found.completions):
        ids = token_ids(completions)
        assert ids == token_ids(other.completions[number]), "the same on every rank"
        for request, one, trainer in zip(requests, completions, found.trainer[number], strict=True):
            assert one.policy_version == found.versions[number]
            assert one.seed == request.seed
            _check_end(one, case)
            assert_close(one.rollout_logprobs, dense_rollout_logprobs(dense, request, one, case), rtol=0, atol=1e-4)
            if case.top_p == 1.0 and case.num_ids == VOCAB_SIZE:
                assert_close(one.rollout_logprobs, trainer, rtol=0, atol=1e-4)
        assert len({tuple(one) for one in ids}) > 20, "24 seeds: hardly two completions alike"
        seen.append(ids)
        assert found.metrics[number]["weight_sync_probe_gap"] < 1e-4
        train_a_little(dense, factor)
    assert seen[0] != seen[1] != seen[2], "other weights, other completions"
    assert token_ids(found.again) == seen[-1], "same seed, same version: same completions"


def _check_end(completion: Completion, case: Case) -> None:
    ids = completion.token_ids.tolist()
    assert max(ids) < case.num_ids
    if completion.finish_reason is FinishReason.STOP:
        assert ids[-1] in STOP_IDS
    else:
        assert len(ids) == MAX_COMPLETION_TOKENS
    assert not set(ids[:-1]) & set(STOP_IDS)
