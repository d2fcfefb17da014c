"""A collection that is told to end goes on where it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch.distributed as dist

from megatron_rlt.config.commands.collect import CollectConfig
from megatron_rlt.jobs.collect.run import run_collect
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.metrics.writer import read_metrics
from tests.jobs.tiny_collect import (
    NUM_PARTS,
    NUM_QUESTIONS,
    QUESTIONS_PER_PART,
    CollectInputs,
    collect_on_ranks,
    rows_of,
)
from tests.ranks import run_ranks


def _told_to_end(config: CollectConfig, phase: str, count: int) -> tuple[int, list[str]]:
    """A run whose last rank gets a SIGTERM when a phase begins for the n-th time."""
    seen: list[str] = []

    def on_phase(name: str) -> None:
        seen.append(name)
        if name == phase and seen.count(name) == count and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    heartbeat = Heartbeat(rank=dist.get_rank(), folder=config.output_dir, timeout_seconds=600, on_phase=on_phase)
    return run_collect(config, heartbeat), seen


def _ended_twice(config: CollectConfig) -> list[tuple[int, list[str]]]:
    return [_told_to_end(config, "rollout", 3), _told_to_end(config, "student", 2), collect_on_ranks(config)]


def test_a_run_that_is_told_to_end_goes_on_where_it_was(
    inputs: CollectInputs, collected: CollectConfig, tmp_path: Path
) -> None:
    config = inputs.config(tmp_path)
    ((first, second, third),) = run_ranks(_ended_twice, 1, config)
    assert [status for status, _ in (first, second, third)] == [75, 75, 0]
    done = [tuple(phases.count(name) for name in ("rollout", "student")) for _, phases in (first, second, third)]
    assert done == [(3, 0), (1, 2), (0, 2)]
    assert rows_of(config) == rows_of(collected)
    assert [record["step"] for record in read_metrics(config.output_dir / "scored")] == [1, 2, 3, 4]
    assert QUESTIONS_PER_PART * NUM_PARTS >= NUM_QUESTIONS
