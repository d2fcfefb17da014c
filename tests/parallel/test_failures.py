"""Which rank is blamed, and what a user reads."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.config.loading import load_config
from megatron_rlt.launch.failures import (
    Failure,
    Kind,
    culprit,
    failure_of_exception,
    failure_of_exit,
    read_failures,
    report,
    write_failure,
)
from megatron_rlt.types import StoppedError


def _failure(rank: int, kind: Kind, seconds: float, num_beats: int = 0) -> Failure:
    return Failure(rank, "update", kind, f"{kind} on {rank}", "", seconds, num_beats)


def _raised(error: Exception) -> Failure:
    try:
        raise error
    except type(error) as caught:
        return failure_of_exception(caught, rank=1, phase="rollout")


def test_a_lost_connection_is_never_blamed_while_a_rank_failed_by_itself() -> None:
    lost, aborted = _failure(0, Kind.CONNECTION, 1.0), _failure(1, Kind.VANISHED, 2.0)
    late, later = _failure(2, Kind.ERROR, 3.0), _failure(3, Kind.KILLED, 4.0)
    assert culprit([lost, aborted, late, later]) is late
    assert culprit([lost, aborted, later]) is later
    assert culprit([lost, aborted]) is aborted
    assert culprit([lost, _failure(1, Kind.CONNECTION, 0.5)]).rank == 1


def test_of_stalled_ranks_the_one_furthest_behind_is_blamed() -> None:
    ahead, behind = _failure(0, Kind.STALL, 1.0, num_beats=8), _failure(1, Kind.STALL, 2.0, num_beats=7)
    assert culprit([ahead, behind, _failure(2, Kind.CONNECTION, 0.1)]) is behind
    text = report(behind, [ahead])
    assert text.splitlines() == [
        "rank 0 made no progress either, in phase update",
        "megatron-rlt: error: rank 1 failed in phase update: stall on 1",
    ]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        ConnectionResetError("Connection reset by peer"),
        dist.DistNetworkError("The client socket has failed to connect"),
    ],
)
def test_broken_connections_are_recognised(error: Exception) -> None:
    assert _raised(error).kind is Kind.CONNECTION


def test_only_a_value_error_of_this_project_is_the_users_fault() -> None:
    with pytest.raises(ValueError, match="no such file; give the path of a YAML file") as caught:
        load_config(JobConfig, Path("gone.yaml"), [])
    users = failure_of_exception(caught.value, rank=2, phase="data")
    assert (users.kind, users.status) == (Kind.INPUT, 2)
    assert report(users) == "megatron-rlt: error: gone.yaml: no such file; give the path of a YAML file\n"

    with pytest.raises(ValueError, match="too many dimensions") as caught:
        torch.tensor(["x"])  # raised inside a library: a defect, whose trace must not be lost
    assert failure_of_exception(caught.value, rank=2, phase="data").status == 1


def test_a_report_has_the_traceback_first_and_ends_in_one_line_with_rank_and_error() -> None:
    failure = _raised(RuntimeError("CUDA error\nCompile with TORCH_USE_CUDA_DSA"))
    lines = report(failure).splitlines()
    assert lines[:2] == ["rank 1 failed in phase rollout:", "Traceback (most recent call last):"]
    assert lines[-1] == "megatron-rlt: error: rank 1 failed in phase rollout: RuntimeError: CUDA error"


def test_a_jobs_own_end_is_one_line_and_a_failure() -> None:
    failure = _raised(StoppedError("step 3: the gap is 2"))
    assert (failure.kind, failure.status) == (Kind.STOPPED, 1)
    assert report(failure) == "megatron-rlt: error: step 3: the gap is 2\n"


def test_exit_codes_are_explained() -> None:
    def explained(code: int) -> tuple[Kind, str]:
        failure = failure_of_exit(code, rank=0, phase="start", seconds=0.0)
        return failure.kind, failure.message

    kill = "killed by SIGKILL (the system ran out of memory, or someone killed it)"
    assert explained(-signal.SIGKILL) == (Kind.KILLED, kill)
    assert explained(-signal.SIGSEGV) == (Kind.KILLED, "killed by SIGSEGV")
    assert explained(-signal.SIGABRT) == (Kind.VANISHED, "killed by SIGABRT")  # what NCCL does when a peer is gone
    assert explained(3) == (Kind.VANISHED, "exited with status 3, no reason given")


def test_records_survive_the_way_to_the_launcher(tmp_path: Path) -> None:
    failures = [_failure(0, Kind.STALL, 1.5, num_beats=3), _raised(RuntimeError("ä\n✗"))]
    for failure in failures:
        write_failure(failure, tmp_path)
    assert read_failures(tmp_path) == failures
