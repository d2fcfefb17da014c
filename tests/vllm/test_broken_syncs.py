"""Weight syncs that break half-way, and a server that is lost while it samples ahead: whatever is sampled has the
weights that it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.rollout.vllm.transfer.direct import BroadcastTransport
from megatron_rlt.rollout.vllm.transfer.files import FileTransport
from megatron_rlt.types import Completion, tell_nobody
from tests.ranks import run_ranks
from tests.vllm.policies import (
    PARTS,
    TIMEOUT_SECONDS,
    Served,
    assert_nothing_runs,
    collect_parts,
    make_requests,
    running,
    save_policy,
    served,
    token_ids,
    train_a_little,
)
from tests.vllm.test_lost_servers import CASE, SERVER, act_during, kill

# One question after the other, so that the second is still pending when the server is lost.
CONFIG = SERVER.model_copy(update={"transport": "broadcast", "bucket_bytes": 2**16, "max_concurrent_requests": 1})
Steps = list[tuple[list[Completion], dict[str, float]]]


def broadcast_breaks(beside: Served) -> None:
    """After a good part of the tensors has gone out, the receiver dies."""
    transport = beside.servers._transport
    assert isinstance(transport, BroadcastTransport)
    check, lose, seen = transport._check, kill(beside, "core"), []

    def check_and_kill() -> None:
        seen.append(1)
        if len(seen) == 8:
            lose()
        check()

    transport._source._check = check_and_kill


def files_break(beside: Served) -> None:
    act_during(beside, "load_folder", kill(beside, "core"))


def live_through_broken_syncs(folder: Path, run: Path) -> dict[str, Any]:
    beside = served(folder, CASE, CONFIG, run)
    found: dict[str, Any] = {"broadcast": _break_a_sync(beside, broadcast_breaks, version=1)}
    beside.servers._transport = FileTransport(folder, run / "weight_sync", tell_nobody)
    found["files"] = _break_a_sync(beside, files_break, version=2)
    found["ahead"] = _lose_it_ahead(beside, version=2)
    found["running"] = running()
    return found


def _break_a_sync(beside: Served, fault: Callable[[Served], None], *, version: int) -> Steps:
    """A step before, one whose sync breaks, one that is undisturbed."""
    before = _step(beside, version - 1)
    train_a_little(beside.model)
    fault(beside)
    return [before, _step(beside, version), _step(beside, version)]


def _step(beside: Served, version: int) -> tuple[list[Completion], dict[str, float]]:
    return beside.engine.generate(make_requests(), policy_version=version), beside.engine.take_metrics()


def _lose_it_ahead(beside: Served, *, version: int) -> dict[str, Any]:
    """Its engine core dies when some questions are answered and some are not; meanwhile the policy has changed."""
    server, asked, count = beside.first, beside.first.complete, iter(range(100))

    def complete(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 1:
            kill(beside, "core")()
        return asked(*args, **kwargs)

    server.complete = complete  # type: ignore[method-assign]
    beside.engine.start(make_requests(), version, PARTS)
    train_a_little(beside.model)
    found: dict[str, Any] = {"come": collect_parts(beside.engine, version + 1), "metrics": beside.engine.take_metrics()}
    found["undisturbed"] = beside.engine.generate(make_requests(), policy_version=version + 1)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    policy = save_policy(folder / "policy", CASE)
    (told,) = run_ranks(live_through_broken_syncs, 1, policy, folder / "run", timeout_seconds=TIMEOUT_SECONDS)
    return told


@pytest.mark.parametrize("transport", ["files", "broadcast"])
def test_a_sync_that_fails_half_way_is_made_again_before_anything_is_sampled(
    transport: str, found: dict[str, Any]
) -> None:
    (before, _), (disturbed, metrics), (undisturbed, _) = found[transport]
    assert metrics["engine_restarts"] == 1.0
    assert metrics["weight_sync_probe_gap"] < 1e-4
    assert token_ids(disturbed) == token_ids(undisturbed) != token_ids(before)


def test_a_server_lost_ahead_keeps_what_it_answered_and_answers_the_rest_with_the_weights_of_now(
    found: dict[str, Any],
) -> None:
    ahead = found["ahead"]
    come, undisturbed = ahead["come"], token_ids(ahead["undisturbed"])
    assert {one.policy_version for one in come[0]} == {2}
    assert {one.policy_version for one in come[1]} == {3}
    assert token_ids(come[1]) == undisturbed[8:], "the policy's completions of now"
    assert token_ids(come[0]) != undisturbed[:8]
    assert ahead["metrics"]["engine_restarts"] == 1.0
    assert ahead["metrics"]["weight_sync_probe_gap"] < 1e-4


def test_nothing_is_left_of_any_server(found: dict[str, Any], folder: Path) -> None:
    assert_nothing_runs(folder, found["running"])
