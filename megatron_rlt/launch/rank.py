"""Runs a job on this process's rank: watchdog, process group, the job itself, and what becomes of its exception."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.launch.failures import Failure, Kind, failure_of_exception, failure_of_stall
from megatron_rlt.launch.watchdog import Heartbeat, Stall
from megatron_rlt.parallel.environment import Place, started_by_elastic, torch_environment
from megatron_rlt.parallel.fp8_support import prepare_fp8
from megatron_rlt.parallel.platform import start_distributed, stop_distributed

Config = TypeVar("Config", bound=JobConfig)
Job = Callable[[Config, Heartbeat], int]

# A collective times out this much later than the watchdog, which reports first because it knows the phase.
_COLLECTIVE_MARGIN_SECONDS = 60.0


@dataclass(frozen=True)
class Listeners:
    """Who is told how the rank fares."""

    on_failure: Callable[[Failure], None]
    """Receives a failure, and may end the process."""
    on_phase: Callable[[str], None] | None = None
    """Receives the name of every new phase."""
    on_tick: Callable[[], None] = lambda: None
    """Called by the watchdog about once a second, whatever the rank's main thread does."""


def run_rank(job: Job[Config], config: Config, place: Place, listeners: Listeners) -> int:
    """Run the job on this rank and return its exit status."""
    rank, timeout = place.rank, config.watchdog.timeout_seconds

    def on_stall(stall: Stall) -> None:
        listeners.on_failure(failure_of_stall(stall, rank=rank))

    heartbeat = Heartbeat(
        rank=rank,
        folder=config.output_dir,
        timeout_seconds=timeout,
        on_phase=listeners.on_phase,
        on_tick=listeners.on_tick,
        on_stall=on_stall,
    )
    try:
        with torch_environment(place), heartbeat:
            start_distributed(
                timeout_seconds=timeout + _COLLECTIVE_MARGIN_SECONDS,
                local_rank=place.local_rank,
                meeting_file=place.meeting_file,
            )
            prepare_fp8(config.models)
            status = job(config, heartbeat)
            heartbeat.beat("stop")
            stop_distributed()
            return status
    except Exception as error:  # noqa: BLE001 - the process boundary: whatever the job raised ends this rank
        failure = failure_of_exception(error, rank=rank, phase=heartbeat.phase)
        # torchrun blames the earliest record of the same second, so a victim leaves none.
        if started_by_elastic() and failure.kind is not Kind.CONNECTION:
            get_error_handler().record_exception(error)
        listeners.on_failure(failure)
        return failure.status


def exit_now(status: int) -> None:
    """End the process without destructors: those of a process group would wait for dead peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
