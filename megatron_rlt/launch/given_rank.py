"""Runs a job on a rank that torchrun or srun started; under a script of `slurm/` its fate goes to the attempt's folder.

There srun ends all ranks as soon as one ends with a status other than 0. So a rank that saved and ended early ends with
0 there, and its real status stands in the folder.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial

from megatron_rlt.launch.failures import Failure, Kind, report
from megatron_rlt.launch.rank import Config, Job, Listeners, exit_now, run_rank
from megatron_rlt.launch.records import Records, attempt_records
from megatron_rlt.launch.watchdog import Heartbeat
from megatron_rlt.parallel.environment import Place, network_settings, node_name
from megatron_rlt.types import ENDED_EARLY

# A rank cannot see its peers' records in time: a rank that only lost a connection waits, so that the culprit reports
# first; usually the launcher ends the waiting rank meanwhile.
_PATIENCE_SECONDS = {Kind.CONNECTION: 3.0, Kind.INPUT: 1.0, Kind.STOPPED: 1.0}


def run_given_rank(job: Job[Config], config: Config, place: Place) -> int:
    """Run the job on this rank; returns the exit status of the process, or ends it."""
    records = attempt_records(config.output_dir) if place.launcher == "srun" else None
    if records is None:
        return run_rank(job, config, place, Listeners(partial(_end_among_peers, place, None)))
    records.mark_place(place.rank)
    listeners = Listeners(
        partial(_end_among_peers, place, records),
        partial(records.mark_phase, place.rank),
        partial(records.mark_alive, place.rank),
    )
    status = run_rank(partial(_announced, job, place), config, place, listeners)
    records.mark_status(place.rank, status)
    records.mark_done(place.rank)
    return 0 if status == ENDED_EARLY else status


def _announced(job: Job[Config], place: Place, config: Config, heartbeat: Heartbeat) -> int:
    """Run the job; the first rank of each node says before what it tells NCCL and gloo of the network."""
    if place.local_rank == 0:
        told = ", ".join(f"{name}={value}" for name, value in network_settings().items())
        print(f"network of {node_name()}: {told}", flush=True)
    return job(config, heartbeat)


def _end_among_peers(place: Place, records: Records | None, failure: Failure) -> None:
    """Report the failure and exit at once: destructors of a process group would wait for dead peers."""
    if records is not None:
        records.write_failure(failure)
        records.mark_status(place.rank, failure.status)
    every_rank_says_it = failure.kind in (Kind.INPUT, Kind.STOPPED)
    if failure.kind is Kind.CONNECTION or (every_rank_says_it and place.rank != 0):
        time.sleep(_PATIENCE_SECONDS[failure.kind])
        failure = replace(failure, details="")
    sys.stderr.write(report(failure))
    exit_now(failure.status)
