"""vLLM's servers beside a policy, through several weight syncs of every kind and sampled ahead, each on one start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.models.checksum import checksums_held
from megatron_rlt.rollout.vllm.transfer.files import FileTransport
from megatron_rlt.types import tell_nobody
from tests.ranks import run_ranks
from tests.vllm.policies import (
    PARTS,
    TIMEOUT_SECONDS,
    Case,
    Served,
    assert_nothing_runs,
    collect_parts,
    dense_rollout_logprobs,
    make_requests,
    running,
    save_policy,
    served,
    token_ids,
    train_a_little,
)
from tests.vllm.versions import check_versions, dense_policy, sample_versions

LAYOUT = LayoutConfig(tp=2, sp=True)
ONE_OF_TP2 = Case("a server of tp2", LAYOUT, "qwen3", tied=True, tp=2, num_ids=300)
TWO = Case("two servers", LAYOUT, "llama", tied=False, tp=1, num_ids=300)
# Versions of each kind of sync, and the change of the policy after each version.
BROADCAST, AHEAD, FILES = (3, 4, 5), (6, 7, 8), (9, 10, 11)
UP, DOWN = 1.05, 0.95
HELD = ["model.norm.weight", "model.layers.1.input_layernorm.weight", "else"]


@dataclass(frozen=True)
class Outcome:
    """What each of two ranks found."""

    case: Case
    folder: Path
    run: Path
    ranks: list[dict[str, Any]]


def sample_after_every_kind_of_sync(folder: Path, run: Path, case: Case, devices: tuple[str, ...]) -> dict[str, Any]:
    # 28 or more buckets; embeddings and projections are larger than one.
    beside = served(folder, case, VllmServerConfig(transport="broadcast", bucket_bytes=2**16, devices=devices), run)
    files = run / "weight_sync"
    found: dict[str, Any] = {"broadcast": sample_versions(beside, case, BROADCAST, UP)}
    found["ahead"] = sample_while_the_policy_changes(beside)
    found["a broadcast's files"] = files.exists()
    beside.servers._transport = FileTransport(folder, files, tell_nobody)
    found["files"] = sample_versions(beside, case, FILES, UP)
    found["running"] = running()
    return found


def sample_while_the_policy_changes(beside: Served) -> dict[str, Any]:
    found: dict[str, Any] = {"come": [], "metrics": []}
    for version in AHEAD:
        beside.engine.start(make_requests(), version, PARTS)
        train_a_little(beside.model, DOWN)
        found["come"].append(collect_parts(beside.engine, version + 1))
        found["metrics"].append(beside.engine.take_metrics())
    found["held"] = beside.servers.checksums_held(HELD)
    return found


@pytest.fixture(
    scope="module", params=[(ONE_OF_TP2, ("",)), (TWO, ("", ""))], ids=lambda param: param[0].name.replace(" ", "_")
)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    case, devices = request.param
    path = tmp_path_factory.mktemp("servers")
    folder = save_policy(path / "policy", case)
    run = path / "run"
    ranks = run_ranks(sample_after_every_kind_of_sync, 2, folder, run, case, devices, timeout_seconds=TIMEOUT_SECONDS)
    return Outcome(case, folder, run, ranks)


@pytest.mark.parametrize(
    ("transport", "changes"), [("broadcast", []), ("files", [UP] * len(BROADCAST) + [DOWN] * len(AHEAD))]
)
def test_a_servers_completions_are_the_policys_after_every_weight_sync(
    outcome: Outcome, transport: str, changes: list[float]
) -> None:
    found, other = (rank[transport] for rank in outcome.ranks)
    check_versions(dense_policy(outcome.folder, changes), outcome.case, found, other, UP)


def test_what_is_sampled_ahead_is_the_policys_of_when_it_was_asked(outcome: Outcome) -> None:
    found, other = (rank["ahead"] for rank in outcome.ranks)
    requests, dense = make_requests(), dense_policy(outcome.folder, [UP] * len(BROADCAST))
    assert found["metrics"][1]["idle_share/trainer"] == other["metrics"][1]["idle_share/trainer"]
    for number, come in enumerate(found["come"]):
        assert sorted(come) == [0, 1]
        assert found["metrics"][number]["weight_sync_probe_gap"] < 1e-4
        for part, asked in enumerate(PARTS):
            for index, one in zip(asked, come[part], strict=True):
                assert one.policy_version == AHEAD[number]
                assert one.seed == requests[index].seed
                expected = dense_rollout_logprobs(dense, requests[index], one, outcome.case)
                assert_close(one.rollout_logprobs, expected, rtol=0, atol=1e-4)
            assert token_ids(come[part]) == token_ids(other["come"][number][part]), "the same on every rank"
        newest = checksums_held(dense, HELD)
        train_a_little(dense, DOWN)
    assert len(newest) == 2
    assert found["held"] == [newest, newest], "what the two workers hold came with the last sync"


def test_a_broadcast_writes_nothing_and_files_pass_through(outcome: Outcome) -> None:
    assert not outcome.ranks[0]["a broadcast's files"]
    assert list((outcome.run / "weight_sync").iterdir()) == []


def test_servers_end_with_their_trainer(outcome: Outcome) -> None:
    started = outcome.ranks[0]["running"]
    assert len(started) >= 4, "a guard, a server, its engine core and a worker"
    assert_nothing_runs(outcome.folder.parent, started)
