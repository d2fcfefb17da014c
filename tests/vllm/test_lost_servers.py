"""vLLM servers that die or hang, each for real: a step is completed with every completion once, or the job ends with
one line; and nothing is left running."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rlt.config.models import LayoutConfig
from megatron_rlt.config.rollout import VllmServerConfig
from megatron_rlt.types import Completion, StoppedError
from tests.ranks import run_ranks
from tests.vllm.policies import (
    TIMEOUT_SECONDS,
    Case,
    Served,
    assert_nothing_runs,
    make_requests,
    running,
    save_policy,
    served,
    token_ids,
)

CASE = Case("one rank", LayoutConfig(), "qwen2", tied=False, tp=1)
# A server that dies is noticed at once; the time-out only has to outlast a crowded machine.
SERVER = VllmServerConfig(request_timeout_seconds=60.0, max_retries=1)
HANG_SECONDS = 5.0


def act_during(beside: Served, method: str, act: Callable[[], None]) -> None:
    """Act a moment after the server is next asked for something."""
    server = beside.first
    asked = getattr(server, method)

    def ask(*args: Any, **kwargs: Any) -> Any:
        setattr(server, method, asked)
        threading.Timer(0.005, act).start()  # a tiny model answers within some 50 ms
        return asked(*args, **kwargs)

    setattr(server, method, ask)


def kill(beside: Served, process: str) -> Callable[[], None]:
    return send(beside, process, signal.SIGKILL)


def send(beside: Served, process: str, number: signal.Signals) -> Callable[[], None]:
    target = beside.processes[process]  # looked up now: it takes longer than an answer of the tiny model
    return lambda: target.send_signal(number)


def killed_before(beside: Served) -> None:
    kill(beside, "api")()


def core_killed_during(beside: Served) -> None:
    act_during(beside, "complete", kill(beside, "core"))


def hangs(beside: Served) -> None:
    beside.first._timeout_seconds = HANG_SECONDS
    act_during(beside, "complete", send(beside, "core", signal.SIGSTOP))


FAULTS = (killed_before, core_killed_during, hangs)


@dataclass(frozen=True)
class Story:
    """A step after each fault of one server, by the fault's name, and how the job ends when faults do not."""

    steps: dict[str, tuple[list[Completion], dict[str, float]]]
    running: list[int]
    last_line: str


def live_through_faults(folder: Path, run: Path) -> Story:
    beside = served(folder, CASE, SERVER, run)
    steps = {"none": _step(beside)}
    for fault in FAULTS:
        fault(beside)
        steps[fault.__name__] = _step(beside)
    pids = running()
    return Story(steps, pids, lose_it_again_and_again(beside))


def _step(beside: Served) -> tuple[list[Completion], dict[str, float]]:
    return beside.engine.generate(make_requests(), policy_version=0), beside.engine.take_metrics()


def lose_it_again_and_again(beside: Served) -> str:
    """It is killed before it is asked, and after every restart."""
    killed_before(beside)
    restart = beside.servers.restart

    def restart_and_lose_again() -> None:
        restart()
        kill(beside, "api")()
        time.sleep(1.0)

    beside.servers.restart = restart_and_lose_again  # type: ignore[method-assign]
    try:
        beside.engine.generate(make_requests(), policy_version=0)
    except StoppedError as error:
        return str(error)
    return "it went on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def story(folder: Path) -> Story:
    policy = save_policy(folder / "policy", CASE)
    (found,) = run_ranks(live_through_faults, 1, policy, folder / "run", timeout_seconds=TIMEOUT_SECONDS)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_server_is_started_again_and_no_completion_is_lost_or_counted_twice(
    fault: Callable[[Served], None], story: Story
) -> None:
    undisturbed, before = story.steps["none"]
    assert before["engine_restarts"] == 0.0
    completions, metrics = story.steps[fault.__name__]
    assert metrics["engine_restarts"] == 1.0
    assert metrics["weight_sync_probe_gap"] < 1e-4, "a server that starts again has the policy's weights again"
    assert token_ids(completions) == token_ids(undisturbed)


def test_a_server_that_is_lost_again_and_again_ends_the_job_with_one_line(story: Story) -> None:
    assert story.last_line.startswith("the sampling engine is lost, and no update was made: unix:/")
    assert "\n" not in story.last_line


def test_nothing_is_left_of_any_server(story: Story, folder: Path) -> None:
    assert len(story.running) >= 4, "a guard, a server, its engine core and a worker"
    assert_nothing_runs(folder, story.running)
