"""vLLM beside a policy, in both placements: its completions and log-probs against the dense model's and the trainer's,
through several weight syncs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.config.sections import LayoutConfig
from megatron_rlt.types import Completion, FinishReason
from tests.ranks import run_ranks
from tests.vllm.policies import (
    MAX_COMPLETION_TOKENS,
    STOP_IDS,
    VERSIONS,
    VOCAB_SIZE,
    Case,
    ask,
    assert_nothing_runs,
    build,
    dense_rollout_logprobs,
    make_requests,
    save_policy,
    spanned,
    train_a_little,
)

CASES = (
    Case("tp2 sp", LayoutConfig(tp=2, sp=True), "qwen2", tied=False, tp=2),
    Case("pp2, two engines", LayoutConfig(pp=2), "qwen3", tied=True, tp=1),
    Case("dp2, one engine", LayoutConfig(), "llama", tied=False, tp=2, temperature=1.0, top_p=0.8),
    Case("few ids", LayoutConfig(tp=2), "qwen3", tied=False, tp=1, num_ids=300),
    Case("cp2, tied", LayoutConfig(cp=2), "qwen2", tied=True, tp=2),
)


# 28 or more buckets; embeddings and projections are larger than one.
BROADCAST = VllmServerConfig(transport="broadcast", bucket_bytes=2**16)
SERVED = Case("a server of tp2", LayoutConfig(tp=2, sp=True), "qwen2", tied=True, tp=2, num_ids=300)


def sample_versions(folder: Path, case: Case, server: VllmServerConfig | None, run: Path) -> dict[str, Any]:
    beside = build(folder, case, server, run)
    engine, requests = beside.engine, make_requests()
    found: dict[str, Any] = {"completions": [], "trainer": [], "metrics": []}
    for version in VERSIONS:
        completions = engine.generate(requests, policy_version=version)
        sequences = [spanned(request, one) for request, one in zip(requests, completions, strict=True)]
        found["completions"].append(completions)
        found["trainer"].append(ask(beside.model, beside.layout, sequences, case.temperature))
        found["metrics"].append(engine.take_metrics())
        # A server is asked for groups, whose completions follow from the first one's seed.
        order = requests if server else list(reversed(requests))
        again = engine.generate(order, policy_version=version)
        found["again"] = again if server else again[::-1]
        assert "weight_sync_seconds" not in engine.take_metrics(), "the policy did not change, so nothing was sent"
        train_a_little(beside.model)
    found["cache_bytes"] = engine.take_peak_cache_bytes()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_colocated_completions_are_the_policys_after_every_weight_sync(case: Case, tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "policy", case)
    found, other = run_ranks(sample_versions, 2, folder, case, None, tmp_path)
    _check_versions(folder, case, found, other)
    assert found["cache_bytes"] > 0


@pytest.mark.parametrize(
    ("case", "server"),
    [
        (SERVED, VllmServerConfig()),
        (replace(SERVED, tp=1, tied=False), VllmServerConfig(devices=("", ""))),
        (replace(SERVED, family="qwen3"), BROADCAST),
        (replace(SERVED, family="llama", tp=1, tied=False), BROADCAST.model_copy(update={"devices": ("", "")})),
    ],
    ids=["tp2", "two servers", "tp2, broadcast", "two servers, broadcast"],
)
def test_a_servers_completions_are_the_policys_after_every_weight_sync(
    case: Case, server: VllmServerConfig, tmp_path: Path
) -> None:
    folder = save_policy(tmp_path / "policy", case)
    found, other = run_ranks(sample_versions, 2, folder, case, server, tmp_path / "run")
    _check_versions(folder, case, found, other)
    files = tmp_path / "run" / "weight_sync"
    assert files.is_dir() == (server.transport == "files")
    assert not files.is_dir() or list(files.iterdir()) == [], "weights pass through"
    assert_nothing_runs(tmp_path)


def _check_versions(folder: Path, case: Case, found: dict[str, Any], other: dict[str, Any]) -> None:
    """What two ranks found, against the dense model in each of its versions."""
    requests = make_requests()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[list[list[int]]] = []
    for number, completions in enumerate(found["completions"]):
        ids = [one.token_ids.tolist() for one in completions]
        assert ids == [one.token_ids.tolist() for one in other["completions"][number]], "the same on every rank"
        for request, one, trainer in zip(requests, completions, found["trainer"][number], strict=True):
            assert one.policy_version == VERSIONS[number]
            assert one.seed == request.seed
            _check_end(one, case)
            assert_close(one.rollout_logprobs, dense_rollout_logprobs(dense, request, one, case), rtol=0, atol=1e-4)
            if case.top_p == 1.0 and case.num_ids == VOCAB_SIZE:
                assert_close(one.rollout_logprobs, trainer, rtol=0, atol=1e-4)
        assert len({tuple(one) for one in ids}) > 20, "24 seeds: hardly two completions alike"
        seen.append(ids)
        assert found["metrics"][number]["weight_sync_probe_gap"] < 1e-4
        train_a_little(dense)
    assert seen[0] != seen[1] != seen[2], "other weights, other completions"
    assert [one.token_ids.tolist() for one in found["again"]] == seen[-1], "same seed, same version: same completions"


def _check_end(completion: Completion, case: Case) -> None:
    ids = completion.token_ids.tolist()
    assert max(ids) < case.num_ids
    if completion.finish_reason is FinishReason.STOP:
        assert ids[-1] in STOP_IDS
    else:
        assert len(ids) == MAX_COMPLETION_TOKENS
    assert not set(ids[:-1]) & set(STOP_IDS)
