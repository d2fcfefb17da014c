"""Runs a job on all its ranks: those that torchrun or srun started, or ranks that it starts itself on this machine.

The exit status is 0, 1 for a failure, 2 for a user error, or 75 for saved and ended by a signal. Stderr names the
culprit of a failure once. SIGTERM and SIGUSR1 reach every rank, which saves and returns 75.
"""

from __future__ import annotations

import signal
import sys

from megatron_rlt.launch.failures import Failure, report
from megatron_rlt.launch.given_rank import run_given_rank
from megatron_rlt.launch.local_ranks import run_local_ranks
from megatron_rlt.launch.rank import Config, Job, Listeners, run_rank
from megatron_rlt.parallel.environment import Place, given_place
from megatron_rlt.whole_files import require_writable

_INTERRUPTED = 128 + signal.SIGINT


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
        return run_given_rank(job, config, place)
    if world_size == 1:
        return _run_alone(job, config)
    return run_local_ranks(job, config, world_size)


def _run_alone(job: Job[Config], config: Config) -> int:
    """Run a single rank in this process."""
    try:
        return run_rank(job, config, Place(0, 1, 0, "this command"), Listeners(_print_failure))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _print_failure(failure: Failure) -> None:
    sys.stderr.write(report(failure))
