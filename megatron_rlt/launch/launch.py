"""Runs a job on all its ranks: those that torchrun or srun started, or ranks that it starts with torch's elastic agent.

The exit status is 0, 1 for a failure, 2 for a user error, or 75 for saved and ended by a signal. Stderr names the
culprit of a failure once. The elastic agent would kill its ranks on SIGTERM, so SIGTERM and SIGUSR1 are forwarded to
the ranks instead, which save and return 75.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_rlt.config.commands.job import JobConfig
from megatron_rlt.launch.failures import Failure, Kind, failure_of_exception, failure_of_stall, report, write_failure
from megatron_rlt.launch.local_ranks import LocalRanks, mark_done, mark_phase
from megatron_rlt.launch.watchdog import Heartbeat, Stall
from megatron_rlt.parallel.environment import Place, given_place, share_cores, started_by_elastic, torch_environment
from megatron_rlt.parallel.fp8_support import prepare_fp8
from megatron_rlt.parallel.platform import start_distributed, stop_distributed
from megatron_rlt.types import FAILED
from megatron_rlt.whole_files import require_writable

Config = TypeVar("Config", bound=JobConfig)
Job = Callable[[Config, Heartbeat], int]

# A collective times out this much later than the watchdog, which reports first because it knows the phase.
_COLLECTIVE_MARGIN_SECONDS = 60.0

# Under torchrun and srun a rank cannot see its peers' records: a rank that only lost a connection waits, so that the
# culprit reports first; usually the launcher ends the waiting rank meanwhile.
_PATIENCE_SECONDS = {Kind.CONNECTION: 3.0, Kind.INPUT: 1.0, Kind.STOPPED: 1.0}

# Ranks that wait for a hanging rank stop beating too, and any of them may notice first; all have reported after one or
# two seconds, and only then the one furthest behind is known.
_STALL_PATIENCE_SECONDS = 3.0
_INTERRUPTED = 128 + signal.SIGINT
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_job(job: Job[Config], config: Config, world_size: int) -> int:
    """Run a job on `world_size` ranks and return the exit status of the whole.

    `job` is a module-level function, which started processes import by name.
    Raises ValueError if torchrun or srun started another number of ranks, or output_dir cannot be written.
    """
    place = given_place()
    require_writable("output_dir", config.output_dir)
    if place is not None:
        if place.world_size != world_size:
            raise ValueError(
                f"world_size={world_size} but {place.launcher} started {place.world_size} ranks;"
                f" set world_size={place.world_size} or start {world_size}"
            )
        return _run_rank(job, config, place, on_failure=partial(_end_among_peers, place))
    if world_size == 1:
        return _run_alone(job, config)
    return _run_local_ranks(job, config, world_size)


def _run_rank(
    job: Job[Config],
    config: Config,
    place: Place,
    *,
    on_failure: Callable[[Failure], None],
    on_phase: Callable[[str], None] | None = None,
) -> int:
    """Run the job on this rank; `on_failure` receives a failure and may end the process."""
    rank, timeout = place.rank, config.watchdog.timeout_seconds

    def on_stall(stall: Stall) -> None:
        on_failure(failure_of_stall(stall, rank=rank))

    heartbeat = Heartbeat(
        rank=rank, folder=config.output_dir, timeout_seconds=timeout, on_phase=on_phase, on_stall=on_stall
    )
    try:
        with torch_environment(place), heartbeat:
            start_distributed(timeout_seconds=timeout + _COLLECTIVE_MARGIN_SECONDS, local_rank=place.local_rank)
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
        on_failure(failure)
        return failure.status


def _run_alone(job: Job[Config], config: Config) -> int:
    """Run a single rank in this process."""
    try:
        return _run_rank(job, config, Place(0, 1, 0, "this command"), on_failure=_print_failure)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run_local_ranks(job: Job[Config], config: Config, world_size: int) -> int:
    share_cores(world_size)
    _silence_elastic()
    with TemporaryDirectory(prefix="megatron-rlt-") as folder, LocalRanks(world_size, Path(folder)) as ranks:
        launch = elastic_launch(_launch_config(config.output_dir / "logs", world_size), _local_rank)
        try:
            statuses: dict[int, int] = launch(job, config, Path(folder), os.getpid())
        except SignalException as interrupted:
            return 128 + interrupted.sigval
        except ChildFailedError as error:
            return ranks.explain_failure(error)
        return max(statuses.values())


def _launch_config(logs: Path, world_size: int) -> LaunchConfig:
    # Ignored signals stay ignored: a run under nohup survives the end of its terminal.
    handled = [s.name for s in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(s) != signal.SIG_IGN]
    redirects = dict.fromkeys(range(1, world_size), Std.OUT)
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=time.strftime("%Y%m%d-%H%M%S"),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        start_method="spawn",
        signals_to_handle=",".join(handled),
        shutdown_timeout=5,
        log_line_prefix_template="rank ${rank}: ",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=redirects, tee=Std.ERR),
    )


def _local_rank(job: Job[Config], config: Config, records: Path, launcher: int) -> int:
    """Entry point of a started process, which is killed when its launcher ends for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(FAILED)
    place = given_place()
    assert place is not None, "the elastic agent sets RANK and WORLD_SIZE"

    def on_failure(failure: Failure) -> None:
        write_failure(failure, records)
        if failure.kind is Kind.STALL:
            time.sleep(_STALL_PATIENCE_SECONDS)
        _exit_now(failure.status)

    try:
        status = _run_rank(job, config, place, on_failure=on_failure, on_phase=partial(mark_phase, records, place.rank))
    except KeyboardInterrupt:
        _exit_now(_INTERRUPTED)
    mark_done(records, place.rank)
    return status


def _end_among_peers(place: Place, failure: Failure) -> None:
    """Report the failure and exit at once: destructors of a process group would wait for dead peers."""
    every_rank_says_it = failure.kind in (Kind.INPUT, Kind.STOPPED)
    if failure.kind is Kind.CONNECTION or (every_rank_says_it and place.rank != 0):
        time.sleep(_PATIENCE_SECONDS[failure.kind])
        failure = replace(failure, details="")
    _print_failure(failure)
    _exit_now(failure.status)


def _print_failure(failure: Failure) -> None:
    sys.stderr.write(report(failure))


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _silence_elastic() -> None:
    """Mute the agent's own failure report, which blames the first exit it saw, possibly a victim."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
